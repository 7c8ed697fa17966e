"""The target's own choice of a token at every row of a tree.

Drafts never enter here. Speculative and plain decoding ask the same function, which is
what makes their texts equal: greedily, or with noise that depends only on a seed and on
the position of the token being chosen.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from .errors import UserError

# Takes logits (B, M, vocab) and the positions (B, M) int32 that the chosen tokens will
# have in the sequence; returns token ids (B, M) int32.
Chooser = Callable[[mx.array, mx.array], mx.array]


def greedy(logits: mx.array, positions: mx.array) -> mx.array:
    """The most probable token."""
    return mx.argmax(logits, axis=-1).astype(mx.int32)


def position_keyed(temp: float, seed: int = 0, top_p: float = 1.0, min_p: float = 0.0, top_k: int = 0) -> Chooser:
    """Sampling whose noise at position p is a function of (seed, p) alone.

    A token is drawn as argmax(log p / temp + g) with Gumbel noise g, which is a draw from
    softmax(log p / temp); filters are mlx-lm's, applied before the temperature as there.

    Args:
        temp: temperature, 0 for greedy.
        seed: any whole number; its lowest 32 bits count.
        top_p: keep the most probable tokens that together reach this share; 1 (and 0, as in mlx-lm) keeps all.
        min_p: keep tokens of at least this share of the best one's probability; 0 keeps all.
        top_k: keep this many; 0 keeps all.

    Raises:
        UserError: a value out of range.
    """
    if not 0 <= temp < float("inf"):
        raise UserError(f"--temp is {temp}, expected 0 or more")
    if not 0 <= top_p <= 1:
        raise UserError(f"--top-p is {top_p}, expected 0 to 1")
    if not 0 <= min_p <= 1:
        raise UserError(f"--min-p is {min_p}, expected 0 to 1")
    if top_k < 0:
        raise UserError(f"--top-k is {top_k}, expected 0 (all) or more")
    if temp == 0:
        return greedy

    def choose(logits: mx.array, positions: mx.array) -> mx.array:
        batch, rows, vocab = logits.shape
        logprobs = logits.astype(mx.float32).reshape(-1, vocab)
        logprobs = logprobs - mx.logsumexp(logprobs, axis=-1, keepdims=True)
        if 0 < top_p < 1:
            logprobs = apply_top_p(logprobs, top_p)
        if min_p > 0:
            logprobs = apply_min_p(logprobs, min_p)
        if 0 < top_k < vocab:
            logprobs = apply_top_k(logprobs, top_k)
        noise = _gumbel(seed, positions.reshape(-1), vocab)
        return mx.argmax(logprobs / temp + noise, axis=-1).reshape(batch, rows).astype(mx.int32)

    return choose


def _gumbel(seed: int, positions: mx.array, vocab: int) -> mx.array:
    """Standard Gumbel noise, (rows, vocab), the same for the same (seed, position)."""
    words = mx.full(positions.shape, seed & 0xFFFFFFFF, mx.uint32)
    keys = mx.stack([words, positions.astype(mx.uint32)], axis=-1)
    return mx.vmap(lambda key: mx.random.gumbel((vocab,), key=key))(keys)


def from_sampler(sampler: Callable[[mx.array], mx.array]) -> Chooser:
    """Uses an mlx-lm sampler (log-probabilities (rows, vocab) in, tokens (rows,) out).

    Every row draws for itself, so the text has the sampler's distribution, but the same
    seed does not give the same text with and without drafts.
    """

    def choose(logits: mx.array, positions: mx.array) -> mx.array:
        batch, rows, vocab = logits.shape
        flat = logits.reshape(-1, vocab)
        logprobs = flat - mx.logsumexp(flat, axis=-1, keepdims=True)
        return sampler(logprobs).reshape(batch, rows).astype(mx.int32)

    return choose
