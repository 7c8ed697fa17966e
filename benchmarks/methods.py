"""Ways of decoding by name: `plain`, `ours`, `chain:3`, `best-first:4x5:7`, `auto`, `auto-no-lookup` and others."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import mlx.nn as nn
import mlx_lm
from mlx_redrafter.benchmarks.side_by_side import Method

from mlx_redrafter.decoding.sampling import Chooser, keyed_sampler, position_keyed
from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.drafting.shape import AUTO, BEAMS, BEST_FIRST, OFF, DraftShape
from mlx_redrafter.errors import UserError
from mlx_redrafter.text.generate import stream_generate

PLAIN, PACKED, OURS = "plain", "plain-packed", "ours"
DRAFTER_AUTO = "auto-no-lookup"  # chooses among the drafter's shapes alone
DEFAULTS = (PLAIN, PACKED, OURS, "chain:3", "beams:4x5:7", "best-first:4x5:7", DRAFTER_AUTO, AUTO)


def _chain(name: str, size: str) -> DraftShape:
    found = re.fullmatch(r"(\d+)?", size)
    if not found:
        raise UserError(f"--methods {name}:{size}: expected {name}:N, N draft tokens in a row")
    nodes = int(found[1] or 3)
    return DraftShape(1, nodes + 1, nodes)


def _tree(name: str, size: str) -> DraftShape:
    found = re.fullmatch(r"(\d+)x(\d+)(?::(\d+))?", size or "4x5:7")
    if not found:
        raise UserError(f"--methods {name}:{size}: expected {name}:WxL:N, W beams of L tokens, N draft tokens checked")
    width, length = int(found[1]), int(found[2])
    return DraftShape(width, length, int(found[3] or width * (length - 1)), name)


# How a name and a size become the shape of drafts.
SHAPES: dict[str, Callable[[str, str], DraftShape]] = {"chain": _chain, BEAMS: _tree, BEST_FIRST: _tree}


def drafts(method: str) -> bool:
    """Whether a method uses the drafter."""
    return method not in (PLAIN, PACKED, OURS)


def shape_named(method: str) -> DraftShape | None:
    """The fixed shape of a method's drafts; None where it drafts nothing, or chooses as it goes.

    Raises:
        UserError: no such method, or a size that is none.
    """
    if not drafts(method) or method in (AUTO, DRAFTER_AUTO):
        return None
    name, _, size = method.partition(":")
    if name not in SHAPES:
        known = ", ".join([PLAIN, PACKED, OURS, AUTO, DRAFTER_AUTO, *SHAPES])
        raise UserError(f"--methods {method}: no such method, expected one of {known}")
    shape = SHAPES[name](name, size)
    try:
        shape.check(vocab_size=2**31)
    except UserError as error:
        raise UserError(f"--methods {method}: {error}") from error
    return shape


@dataclasses.dataclass
class Decoder:
    """Makes methods that decode token ids with one pair of models.

    Args:
        model, tokenizer, drafter: the pair.
        max_tokens: per text.
        temp, seed: of the target's choices; temperature 0 is greedy.
        as_loaded: the target that mlx_lm's plain loop runs, if not `model`: the same, its weights not packed.
    """

    model: nn.Module
    tokenizer: Any
    drafter: Drafter | None
    max_tokens: int
    temp: float = 0.0
    seed: int = 0
    as_loaded: nn.Module | None = None

    def method(self, name: str) -> Method:
        """The method of that name (see `shape_named`)."""
        if drafts(name):
            return self.drafted(shape_named(name) or AUTO, AUTO if name == AUTO else OFF)
        return {PLAIN: self.plain, PACKED: self.packed, OURS: self.ours}[name]

    def plain(self, prompt: list[int]) -> Iterable:
        """mlx_lm's own loop over the target as mlx_lm loads it."""
        return self._mlx_lm(self.as_loaded or self.model, prompt)

    def packed(self, prompt: list[int]) -> Iterable:
        """mlx_lm's own loop over the target as we load it."""
        return self._mlx_lm(self.model, prompt)

    def _mlx_lm(self, model: nn.Module, prompt: list[int]) -> Iterable:
        """At a temperature it asks our sampler, so that it writes the seed's text, too."""
        sampler: dict[str, Any] = {} if self.temp == 0 else {"sampler": keyed_sampler(self.chooser(), len(prompt))}
        return mlx_lm.stream_generate(model, self.tokenizer, prompt, max_tokens=self.max_tokens, **sampler)

    def ours(self, prompt: list[int]) -> Iterable:
        """Our loop without drafts."""
        return stream_generate(self.model, self.tokenizer, prompt, max_tokens=self.max_tokens, chooser=self.chooser())

    def drafted(self, shape: DraftShape | str, lookup: str = OFF) -> Method:
        """Our loop with drafts of a shape, or "auto", and of lookup if that is "on" or "auto"."""
        options: dict[str, Any] = {"max_tokens": self.max_tokens, "chooser": self.chooser(), "shape": shape}
        options["lookup"] = lookup
        return lambda prompt: stream_generate(self.model, self.tokenizer, prompt, self.drafter, **options)

    def chooser(self) -> Chooser:
        return position_keyed(self.temp, self.seed)
