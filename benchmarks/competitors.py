"""Makes the ways of decoding that are compared: a name becomes a `Method`.

Names: `plain`, `ours`, `chain:3`, `best-first:4x5:7`, `auto`, `auto-no-lookup` and the like; and of a comparison of
methods, each with its settings. Knows nothing of how methods are timed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_redrafter.benchmarks.compare import Method

from mlx_redrafter.decoding.sampling import Chooser, position_keyed
from mlx_redrafter.drafting.cached.draft_model import DraftModel
from mlx_redrafter.drafting.cached.eagle import EagleHead
from mlx_redrafter.drafting.kinds import Drafter, open_drafter
from mlx_redrafter.drafting.medusa import MedusaHeads
from mlx_redrafter.drafting.redrafter import RecurrentDrafter
from mlx_redrafter.drafting.shape import AUTO, BEAMS, BEST_FIRST, OFF, ON, DraftShape
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.weights import weights
from mlx_redrafter.text.generate import stream_generate
from mlx_redrafter.text.loading import find_drafter, find_target, fit_drafter, load_target

PLAIN, AS_LOADED, OURS = "plain", "as-loaded", "ours"
CHAIN_OF_3, TREE_OF_7 = "chain:3", "best-first:4x5:7"
DRAFTER_AUTO = "auto-no-lookup"  # chooses among the drafter's shapes alone
DEFAULTS = (PLAIN, AS_LOADED, OURS, CHAIN_OF_3, "beams:4x5:7", TREE_OF_7, DRAFTER_AUTO, AUTO)

DRAFT_MODEL, OUR_DRAFT_MODEL, LOOKUP = "draft model", "draft model, our loop", "lookup"
MEDUSA, EAGLE = "Medusa", "EAGLE-3"
HEADS: dict[str, type[Drafter]] = {MEDUSA: MedusaHeads, EAGLE: EagleHead}  # beside the recurrent one
NO_LOOKUP, REDRAFTER_AUTO = "ReDrafter auto, no lookup", "ReDrafter auto"  # the second as generate does it
REDRAFTER = ("ReDrafter chain", "ReDrafter beams", "ReDrafter best-first", NO_LOOKUP, REDRAFTER_AUTO)

# Of each method of a comparison the settings that are tried; the fastest on the prompts of the search takes part.
SETTINGS: dict[str, tuple[str, ...]] = {
    PLAIN: ("",),
    DRAFT_MODEL: ("1", "2", "3", "4", "5"),
    OUR_DRAFT_MODEL: ("chain:1", "chain:2", CHAIN_OF_3, "chain:4", "best-first:3x4:5", TREE_OF_7, AUTO),
    MEDUSA: ("chain:2", CHAIN_OF_3, "best-first:4x4:5", TREE_OF_7, "best-first:10x5:12"),
    EAGLE: ("chain:1", "chain:2", CHAIN_OF_3, "best-first:3x4:5", TREE_OF_7),
    REDRAFTER[0]: ("chain:1", "chain:2", CHAIN_OF_3, "chain:4"),
    REDRAFTER[1]: ("beams:2x4:4", "beams:3x4:6", "beams:4x5:8"),
    REDRAFTER[2]: ("best-first:3x4:5", TREE_OF_7, "best-first:4x5:12"),
    NO_LOOKUP: (AUTO,),
    LOOKUP: ("chain:2", CHAIN_OF_3, "chain:4", "chain:6"),
    REDRAFTER_AUTO: (AUTO,),
}


def drafts(method: str) -> bool:
    """Whether a method uses the drafter."""
    return method not in (PLAIN, AS_LOADED, OURS)


def shape_named(method: str) -> DraftShape | None:
    """The fixed shape of a method's drafts; None where it drafts nothing, or chooses as it goes.

    Raises:
        UserError: no such method, or a size that is none.
    """
    if not drafts(method) or method in (AUTO, DRAFTER_AUTO):
        return None
    name, _, size = method.partition(":")
    if name == "chain":
        if not re.fullmatch(r"\d*", size):
            raise UserError(f"--methods {method}: expected chain:N, N draft tokens in a row")
        nodes = int(size or 3)
        shape = DraftShape(1, nodes + 1, nodes)
    elif name in (BEAMS, BEST_FIRST):
        found = re.fullmatch(r"(\d+)x(\d+)(?::(\d+))?", size or "4x5:7")
        if not found:
            raise UserError(f"--methods {method}: expected {name}:WxL:N, W beams of L tokens, N draft tokens checked")
        width, length = int(found[1]), int(found[2])
        shape = DraftShape(width, length, int(found[3] or width * (length - 1)), name)
    else:
        known = ", ".join([PLAIN, AS_LOADED, OURS, AUTO, DRAFTER_AUTO, "chain", BEAMS, BEST_FIRST])
        raise UserError(f"--methods {method}: no such method, expected one of {known}")
    try:
        shape.check(vocab_size=2**31)
    except UserError as error:
        raise UserError(f"--methods {method}: {error}") from error
    return shape


def name_of(shape: DraftShape) -> str:
    """A shape's name, of which `shape_named` makes the shape."""
    if shape.beam_width == 1:
        return f"chain:{shape.num_draft_tokens}"
    return f"{shape.tree_policy}:{shape.beam_width}x{shape.beam_length}:{shape.num_draft_tokens}"


@dataclasses.dataclass
class Decoder:
    """Makes methods that decode token ids with one pair of models.

    Args:
        model, tokenizer, drafter: the pair.
        max_tokens: per text.
        temp, seed: of the target's choices; temperature 0 is greedy.
        unpacked: the target as mlx_lm loads it, if its weights lie otherwise than the model's.
        caches: makes the caches that a text begins with, one call a text; None for the method's own.
    """

    model: nn.Module
    tokenizer: Any
    drafter: Drafter | None
    max_tokens: int
    temp: float = 0.0
    seed: int = 0
    unpacked: nn.Module | None = None
    caches: Callable[[], list[Any]] | None = None

    def method(self, name: str) -> Method:
        """The method of that name (see `shape_named`)."""
        if drafts(name):
            return self.drafted(shape_named(name) or AUTO, AUTO if name == AUTO else OFF)
        return {PLAIN: self.plain, AS_LOADED: self.as_loaded, OURS: self.ours}[name]

    def plain(self, prompt: list[int]) -> Iterable:
        """mlx_lm's own loop over the weights that all methods read, in the same layout."""
        return self._mlx_lm(self.model, prompt)

    def as_loaded(self, prompt: list[int]) -> Iterable:
        """mlx_lm's own loop over the weights in the layout that mlx_lm loads them in."""
        return self._mlx_lm(self.unpacked or self.model, prompt)

    def _mlx_lm(self, model: nn.Module, prompt: list[int], **options: Any) -> Iterable:
        """At a temperature mlx_lm asks our sampler, so that it writes the seed's text, too."""
        if self.caches is not None:
            options["prompt_cache"] = self.caches()
        sampler = None
        if self.temp > 0:
            sampler = options["sampler"] = PositionSampler(self.chooser(), len(prompt))
        stream = mlx_lm.stream_generate(model, self.tokenizer, prompt, max_tokens=self.max_tokens, **options)
        for response in stream:
            if sampler is not None and "draft_model" in options:
                sampler.taken()
            yield response

    def with_draft_model(self, draft: nn.Module, num_draft_tokens: int) -> Method:
        """mlx_lm's own speculative decoding.

        At a temperature both models draw with the noise of the token's position. So the text is the seed's, and the
        draft's draws agree with the target's at least as often as with mlx_lm's sampler, which draws for each apart.
        """
        return lambda prompt: self._mlx_lm(self.model, prompt, draft_model=draft, num_draft_tokens=num_draft_tokens)

    def ours(self, prompt: list[int]) -> Iterable:
        """Our loop without drafts."""
        return self._ours(prompt, None)

    def drafted(self, shape: DraftShape | str, lookup: str | None = OFF) -> Method:
        """Our loop with drafts of a shape, or "auto", and of lookup: "on", "auto", or None for the usual choice."""
        return lambda prompt: self._ours(prompt, self.drafter, shape=shape, lookup=lookup)

    def _ours(self, prompt: list[int], drafter: Drafter | None, **options: Any) -> Iterable:
        if self.caches is not None:
            options["prompt_cache"] = self.caches()
        options |= {"max_tokens": self.max_tokens, "chooser": self.chooser()}
        return stream_generate(self.model, self.tokenizer, prompt, drafter, **options)

    def chooser(self) -> Chooser:
        return position_keyed(self.temp, self.seed)


class PositionSampler:
    """An mlx-lm sampler for one text that draws with each position's own noise, as a position-keyed chooser does.

    The plain loop asks it once for each token, in order. Speculative decoding asks it once for each draft token of a
    round, and then for all rows of the target; tokens are taken between rounds only, which tells where one begins.

    Args:
        choose: the chooser.
        position: of the first token.
    """

    def __init__(self, choose: Chooser, position: int):
        self._choose, self._position, self._drafted = choose, position, 0

    def taken(self) -> None:
        """Speculative decoding gave a token out."""
        self._position, self._drafted = self._position + 1, 0

    def __call__(self, logprobs: mx.array) -> mx.array:
        rows = logprobs.shape[0]
        first = self._position
        if rows == 1:
            first, self._drafted = first + self._drafted, self._drafted + 1
        positions = first + mx.arange(rows, dtype=mx.int32)
        return self._choose(logprobs[None], positions[None])[0]


@dataclasses.dataclass
class Contest:
    """The drafters of a comparison of methods.

    Attributes:
        drafters: by method: the recurrent one for all that are ReDrafter's, and those that flags name.
        facts: what was loaded, by name.
        missing: sentences that say what is left out, and why.
    """

    drafters: dict[str, Drafter]
    facts: dict[str, str] = dataclasses.field(default_factory=dict)
    missing: list[str] = dataclasses.field(default_factory=list)

    def methods(self) -> list[str]:
        """The names of those that take part, plain decoding first."""
        return [name for name in SETTINGS if name in (PLAIN, LOOKUP) or name in self.drafters]

    def method(self, decoder: Decoder, name: str, setting: str) -> Method:
        """A method in one of its settings."""
        if name == PLAIN:
            return decoder.plain
        drafter = self.drafters.get(name)
        if name == DRAFT_MODEL:
            assert isinstance(drafter, DraftModel)
            return decoder.with_draft_model(drafter.model, int(setting))
        lookup = {LOOKUP: ON, REDRAFTER_AUTO: AUTO}.get(name, OFF)
        return dataclasses.replace(decoder, drafter=drafter).drafted(shape_named(setting) or AUTO, lookup)

    def drafter_bytes(self, name: str) -> int:
        """Bytes of weights that a method has beside the target's."""
        return weights(self.drafters[name])[1] if name in self.drafters else 0


def open_contest(
    model: nn.Module, tokenizer: Any, drafter: RecurrentDrafter, draft_model: str | None, heads: dict[str, str | None]
) -> Contest:
    """Loads what the flags name.

    Args:
        heads: by method, where they are; None for those that take no part.

    Raises:
        UserError: a model or heads for another target.
    """
    contest = Contest(dict.fromkeys(REDRAFTER, drafter))

    def enter(other: Drafter, methods: tuple[str, ...], flag: str, name: str) -> None:
        fit_drafter(other, model, tokenizer, f"{flag} {name}")
        contest.drafters |= dict.fromkeys(methods, other)
        contest.facts[methods[0]] = f"{name}, {weights(other)[1] / 1e6:.1f} MB of weights"

    if draft_model is None:
        contest.missing.append("a draft model takes no part: --draft-model was not given.")
    else:
        loaded = DraftModel(*load_target(find_target(draft_model, "--draft-model")))
        enter(loaded, (DRAFT_MODEL, OUR_DRAFT_MODEL), "--draft-model", draft_model)
    for method, place in heads.items():
        flag = flag_of(method)
        if place is None:
            contest.missing.append(f"{method} takes no part: {flag} was not given.")
            continue
        found = open_drafter(find_drafter(place, flag))
        if not isinstance(found, HEADS[method]):
            raise UserError(f"{flag} {place}: is a drafter of the kind {found.method}, expected {method}")
        enter(found, (method,), flag, place)
    return contest


def flag_of(method: str) -> str:
    """That names the heads of a method."""
    return "--" + method.lower().removesuffix("-3")
