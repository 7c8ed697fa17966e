"""One text of a batch: what is asked for, how far it is, and where it ends.

Knows nothing of other texts, nor of the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mlx_redrafter.decoding.step import DecodingOptions, Produced
from mlx_redrafter.errors import UserError

STOP, LENGTH = "stop", "length"


def _never(token: int) -> bool:
    return False


@dataclasses.dataclass(eq=False)
class BatchText:
    """One text.

    Args:
        prompt: token ids that the cache does not hold yet, at least one.
        options: how its tokens are chosen, and how many. The KV cache is not quantised in a batch.
        ends: told of every token in order, says whether the text ends with it.
        prompt_cache: mlx-lm caches to go on from; they are used up, and None once its prompt is being read.
        wants_cache: leave what was read of it in `cache` when it ends.
        before: the tokens that prompt_cache holds, where they are known; lookup finds what is repeated of them.

    Raises:
        UserError: a constraint: pruning is for one tree, and a batch shares a shape.

    Attributes:
        tokens: so far.
        start, length: tokens of the prompt, those cached before it included, and in the KV cache after the last step
            that was read.
        known: tokens that its caches hold: the prompt, what was cached before it, and all tokens but the last.
        finish_reason: "stop", "length", "removed" or "error" once it has ended.
        error: what ended it, if one of its own functions did.
        cache: mlx-lm caches of the `known` tokens.
        follows: what the planner has for it.
    """

    prompt: list[int]
    options: DecodingOptions
    ends: Callable[[int], bool] = _never
    prompt_cache: list[Any] | None = None
    wants_cache: bool = False
    before: Sequence[int] = ()
    tokens: list[int] = dataclasses.field(default_factory=list)
    length: int = 0
    start: int = 0
    finish_reason: str | None = None
    error: Exception | None = None
    cache: list[Any] | None = None
    follows: Any = None

    def __post_init__(self) -> None:
        if self.options.matcher is not None:
            raise UserError("structured output is for one text at a time, expected none in a batch")

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None

    @property
    def known(self) -> int:
        return max(0, self.start + len(self.tokens) - 1)

    def fail(self, error: Exception) -> None:
        """Ends the text where one of its own functions has failed."""
        self.error, self.finish_reason = error, "error"

    def goes_on_after(self, tokens: int) -> bool:
        """Whether so many tokens more leave room for others."""
        return not self.ended and (self.options.max_tokens < 0 or len(self.tokens) + tokens < self.options.max_tokens)

    def take(self, tokens: list[int]) -> list[int]:
        """Of a step's tokens those that belong to the text; notes whether it ends with them."""
        taken = []
        for token in tokens:
            taken.append(token)
            self.tokens.append(token)
            if self.ends(token):
                self.finish_reason = STOP
            elif len(self.tokens) == self.options.max_tokens:
                self.finish_reason = LENGTH
            if self.ended:
                break
        return taken


@dataclasses.dataclass
class TextStep:
    """What one text got of a step, nothing where it has failed; its last one where the text has ended."""

    text: BatchText
    produced: Produced | None
