"""Who takes part in a comparison: methods, each with the settings it may choose its best from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_redrafter.benchmarks.methods import PLAIN, Decoder, shape_named
from mlx_redrafter.benchmarks.peers import load_draft_model, with_draft_model
from mlx_redrafter.benchmarks.setup import Pair
from mlx_redrafter.benchmarks.side_by_side import Method, side_by_side, summarize

from mlx_redrafter.drafting.kinds import Drafter, open_drafter
from mlx_redrafter.drafting.medusa import MedusaHeads
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.drafting.shape import AUTO, OFF, ON
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.hub import fetch
from mlx_redrafter.system.openblas_layout import pack
from mlx_redrafter.system.weights import weights
from mlx_redrafter.target.model import Target

DRAFT_MODEL, MEDUSA, LOOKUP = "draft model", "Medusa", "lookup"
CHAIN, BEAMS, BEST_FIRST = "ReDrafter chain", "ReDrafter beams", "ReDrafter best-first"
NO_LOOKUP, REDRAFTER_AUTO = "ReDrafter auto, no lookup", "ReDrafter auto"  # the second as generate does it
REDRAFTER = (CHAIN, BEAMS, BEST_FIRST, NO_LOOKUP, REDRAFTER_AUTO)

# Of each method the settings that are tried; the fastest on the prompts of the search takes part.
SETTINGS: dict[str, tuple[str, ...]] = {
    PLAIN: ("",),
    DRAFT_MODEL: ("1", "2", "3", "4", "5"),
    MEDUSA: ("chain:2", "chain:3", "best-first:4x4:5", "best-first:4x5:7", "best-first:10x5:12"),
    CHAIN: ("chain:2", "chain:3", "chain:4"),
    BEAMS: ("beams:2x4:4", "beams:3x4:6", "beams:4x5:8"),
    BEST_FIRST: ("best-first:3x4:5", "best-first:4x5:7", "best-first:4x5:12"),
    NO_LOOKUP: (AUTO,),
    LOOKUP: ("chain:2", "chain:3", "chain:4", "chain:6"),
    REDRAFTER_AUTO: (AUTO,),
}


@dataclasses.dataclass
class Contest:
    """The models of a comparison.

    Attributes:
        pair: the target and its recurrent drafter.
        draft: mlx_lm's draft model, if there is one.
        medusa: Medusa heads, if there are any.
        missing: sentences that say what is left out, and why.
    """

    pair: Pair
    draft: nn.Module | None
    medusa: Drafter | None
    missing: list[str]

    def methods(self) -> list[str]:
        """The names of those that take part, plain decoding first."""
        absent = {DRAFT_MODEL: self.draft is None, MEDUSA: self.medusa is None}
        return [name for name in SETTINGS if not absent.get(name)]

    def method(self, decoder: Decoder, name: str, setting: str) -> Method:
        """A method in one of its settings.

        Args:
            decoder: with the recurrent drafter.
        """
        if name == PLAIN:
            return decoder.plain
        if name == DRAFT_MODEL:
            assert self.draft is not None
            return with_draft_model(decoder, self.draft, int(setting))
        shape = shape_named(setting) or AUTO
        if name == MEDUSA:
            return dataclasses.replace(decoder, drafter=self.medusa).drafted(shape)
        if name == LOOKUP:
            return dataclasses.replace(decoder, drafter=None).drafted(shape, ON)
        return decoder.drafted(shape, AUTO if name == REDRAFTER_AUTO else OFF)

    def drafter_bytes(self, name: str) -> int:
        """Bytes of weights that a method has beside the target's."""
        if name in (PLAIN, LOOKUP):
            return 0
        module = {DRAFT_MODEL: self.draft, MEDUSA: self.medusa}.get(name, self.pair.drafter)
        assert module is not None
        return weights(module)[1]


@dataclasses.dataclass
class Tried:
    """One setting in the search for a method's best."""

    method: str
    setting: str
    tokens_per_second: float
    acceptance: float
    best: bool = False


def open_contest(pair: Pair, draft_model: str | None, medusa: str | None) -> Contest:
    """Loads what the flags name.

    Raises:
        UserError: a model or heads for another target.
    """
    missing, target = [], Target.of(pair.model)
    draft, heads = None, None
    if draft_model is None:
        missing.append("mlx_lm's draft model takes no part: --draft-model was not given.")
    else:
        draft = load_draft_model(draft_model, target)
        pair.facts["draft model"] = f"{draft_model}, {weights(draft)[1] / 1e6:.1f} MB of weights"
    if medusa is None:
        missing.append("Medusa takes no part: --medusa was not given.")
    else:
        heads = open_drafter(fetch(medusa, "--medusa"))
        if not isinstance(heads, MedusaHeads):
            raise UserError(f"--medusa {medusa}: is a recurrent drafter, expected Medusa heads")
        check_pair(target, heads, f"--medusa {medusa}")
        if heads.config.quantization is None:
            heads.set_dtype(target.dtype)
        mx.eval(heads.parameters())
        pack(heads)
        pair.facts["Medusa heads"] = f"{medusa}, {weights(heads)[1] / 1e6:.1f} MB of weights"
    return Contest(pair, draft, heads, missing)


def search(contest: Contest, decoder: Decoder, texts: Sequence[list[int]]) -> list[Tried]:
    """Every setting of every method that has a choice, side by side on a few prompts.

    Returns:
        all that were tried; of each method the fastest is marked.
    """
    tried: list[Tried] = []
    for name in contest.methods():
        settings = SETTINGS[name]
        if len(settings) == 1:
            tried.append(Tried(name, settings[0], 0.0, 0.0, best=True))
            continue
        summaries = summarize(side_by_side({s: contest.method(decoder, name, s) for s in settings}, texts))
        found = [Tried(name, s, one.tokens_per_second, one.acceptance) for s, one in summaries.items()]
        max(found, key=lambda one: one.tokens_per_second).best = True
        tried += found
    return tried
