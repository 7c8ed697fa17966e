"""What a user can set: how much is drafted, and what plain and speculative decoding share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from mlx_redrafter.constraints.matcher import Matcher
from mlx_redrafter.decoding.logits_processors import LogitsProcessor
from mlx_redrafter.decoding.sampling import Chooser, greedy
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.cache.kv_cache import quantize_layers

Progress = Callable[[int, int], None]  # prompt tokens read so far, and in all


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
    """What plain and speculative decoding have in common.

    Args:
        choose: how the target chooses.
        max_tokens: stop after this many; -1 for no limit.
        processors: mlx-lm's logits processors; they see the prompt and all tokens after it.
        matcher: what a text has to be, at its beginning; follows one text. None for anything.
        prefill_step_size: prompt tokens read at a time.
        progress: called with the prompt tokens read so far and in all.
        keep_logits: give the logits of what a step produced to who asked for it; False where nobody looks at them.
        kv_bits, kv_group_size, quantized_kv_start: keep the KV cache in so many bits once
            it holds so many rows; None keeps it as it is.

    Raises:
        UserError: a value out of range.
    """

    choose: Chooser = greedy
    max_tokens: int = 256
    processors: Sequence[LogitsProcessor] = ()
    matcher: Matcher | None = None
    prefill_step_size: int = 2048
    progress: Progress | None = None
    keep_logits: bool = True
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000

    def __post_init__(self) -> None:
        if self.max_tokens == 0 or self.max_tokens < -1:
            raise UserError(f"max_tokens is {self.max_tokens}, expected 1 or more, or -1 for no limit")
        if self.prefill_step_size < 1:
            raise UserError(f"prefill_step_size is {self.prefill_step_size}, expected 1 or more")
        if self.quantized_kv_start < 0:
            raise UserError(f"quantized_kv_start is {self.quantized_kv_start}, expected 0 or more")
        if self.kv_bits not in (None, 2, 4, 8):
            raise UserError(f"kv_bits is {self.kv_bits}, expected 2, 4 or 8")

    def quantize(self, layers: list[Any], length: int) -> None:
        """Quantises mlx-lm caches, or ours, that hold so many rows, where it is time for it."""
        if self.kv_bits is not None and length >= self.quantized_kv_start:
            quantize_layers(layers, self.kv_group_size, self.kv_bits)
