"""mlx_lm's own speculative decoding with a draft model, driven through its public function."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_redrafter.benchmarks.methods import Decoder
from mlx_redrafter.benchmarks.side_by_side import Method

from mlx_redrafter.decoding.sampling import Chooser
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.hub import fetch
from mlx_redrafter.system.openblas_layout import pack
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.loading import load_target


def load_draft_model(path: str, target: Target) -> nn.Module:
    """A draft model in the target's type.

    Raises:
        UserError: it is no mlx-lm model, or has another vocabulary.
    """
    model, _ = load_target(fetch(path, "--draft-model"), None, None)
    found = Target.of(model).vocab_size
    if found != target.vocab_size:
        raise UserError(f"--draft-model {path}: vocabulary of {found}, the target's is {target.vocab_size}")
    if not any("scales" in module for module in model.modules()):
        model.set_dtype(target.dtype)
    mx.eval(model.parameters())
    return pack(model)  # as the target is that it drafts for


def with_draft_model(decoder: Decoder, draft: nn.Module, num_draft_tokens: int) -> Method:
    """mlx_lm's stream_generate with a draft model.

    At a temperature both models draw with the noise of the token's position, so the text is
    the seed's, and the draft's draws agree with the target's at least as often as with
    mlx_lm's own sampler, which draws for each apart.
    """

    def run(prompt: list[int]) -> Iterable:
        options: dict[str, Any] = {"num_draft_tokens": num_draft_tokens, "max_tokens": decoder.max_tokens}
        sampler = None
        if decoder.temp > 0:
            sampler = options["sampler"] = RoundSampler(decoder.chooser(), len(prompt))
        stream = mlx_lm.stream_generate(decoder.model, decoder.tokenizer, prompt, draft_model=draft, **options)
        for response in stream:
            if sampler is not None:
                sampler.taken()
            yield response

    return run


class RoundSampler:
    """An mlx-lm sampler for speculative decoding that draws as a position-keyed chooser does.

    A round asks it once for each draft token, a row at a time, and then for all rows of the
    target. Tokens are taken between rounds only, which tells where a round begins.

    Args:
        choose: the chooser.
        position: of the first token.
    """

    def __init__(self, choose: Chooser, position: int):
        self._choose, self._position, self._drafted = choose, position, 0

    def taken(self) -> None:
        """A token was given out."""
        self._position, self._drafted = self._position + 1, 0

    def __call__(self, logprobs: mx.array) -> mx.array:
        rows = logprobs.shape[0]
        first = self._position
        if rows == 1:
            first, self._drafted = first + self._drafted, self._drafted + 1
        positions = first + mx.arange(rows, dtype=mx.int32)
        return self._choose(logprobs[None], positions[None])[0]
