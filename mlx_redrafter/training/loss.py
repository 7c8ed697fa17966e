"""Distillation: the head's distribution at each step against the target's own.

At position t the drafter reads the target's hidden state h_t and the tokens x_{t+1} ..
x_{t+k}; its step k has to guess what the target says after x_{t+k}, and the target's
logits at position t + k are at hand from the same forward pass (paper, section 3.4).
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from ..drafter import RecurrentDrafter
from ..target import Target


@mx.custom_function
def soft_cross_entropy(logits: mx.array, ids: mx.array, shares: mx.array) -> mx.array:
    """-sum_j shares_j log softmax(logits)[ids_j], per row.

    Its gradient needs one exponential per logit more, no second normalisation: with a
    vocabulary at every step and position this is where the time goes on a CPU.

    Args:
        logits: (M, vocab) float32.
        ids: (M, k) int32 the teacher's tokens.
        shares: (M, k) float32 their probabilities, summing to 1.

    Returns:
        (M,) in nats.
    """
    most = mx.max(logits, axis=-1, keepdims=True)
    normaliser = most[:, 0] + mx.log(mx.sum(_exp(logits - most), axis=-1))
    return normaliser - _expected(logits, ids, shares)


@soft_cross_entropy.vjp
def _soft_cross_entropy_vjp(primals, cotangent, output):
    logits, ids, shares = primals
    normaliser = output + _expected(logits, ids, shares)
    gradient = _exp(logits - normaliser[:, None])
    rows = mx.arange(ids.shape[0])[:, None]
    gradient = gradient.at[rows, ids].subtract(shares)
    return gradient * cotangent[:, None], mx.zeros_like(ids), mx.zeros_like(shares)


def _expected(logits: mx.array, ids: mx.array, shares: mx.array) -> mx.array:
    return mx.sum(mx.take_along_axis(logits, ids, axis=-1) * shares, axis=-1)


def _exp(x: mx.array) -> mx.array:
    # MLX's CPU backend takes 7 ns for a power of two and 16 ns for exp; on a GPU they are equal.
    return mx.power(2.0, x * (1 / math.log(2)))


def teacher(logits: mx.array, top_k: int) -> tuple[mx.array, mx.array]:
    """The target's k most probable tokens and their probabilities among themselves.

    Args:
        logits: (..., vocab).
        top_k: 1 gives hard labels: the target's own greedy choice.

    Returns:
        ids (..., k) int32 and shares (..., k) float32.
    """
    if top_k == 1:
        ids = mx.argmax(logits, axis=-1, keepdims=True)
        return ids.astype(mx.int32), mx.ones(ids.shape, mx.float32)
    ids = mx.argpartition(-logits, top_k - 1, axis=-1)[..., :top_k]
    shares = mx.softmax(mx.take_along_axis(logits, ids, axis=-1).astype(mx.float32), axis=-1)
    return ids.astype(mx.int32), shares


class TeacherReader:
    """What the frozen target makes of rows of text: one forward pass per row, then kept.

    Args:
        target: the model.
        rows: (R, T) int32 token ids.
        top_k: teacher tokens kept per position.
        budget: bytes that kept results may take; rows beyond it are read again each time.
    """

    def __init__(self, target: Target, rows: np.ndarray, top_k: int, budget: int):
        self.target, self.rows, self.top_k, self.budget = target, rows, top_k, budget
        self._kept: dict[int, tuple[mx.array, ...]] = {}

    def __call__(self, picks: np.ndarray) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Reads B rows.

        Args:
            picks: (B,) which rows.

        Returns:
            hidden (B, T, hidden_size) bfloat16, embeddings (B, T, hidden_size), and the
            teacher's ids and shares (B, T, k).
        """
        read = {int(row): self._kept[row] for row in picks if row in self._kept}
        new = [int(row) for row in picks if row not in self._kept]
        if new:
            parts = self._read(mx.array(self.rows[new]))
            mx.eval(parts)
            for i, row in enumerate(new):
                # A copy of its own, or the whole batch would stay in memory with it.
                read[row] = tuple(mx.contiguous(part[i : i + 1]) for part in parts)
                size = sum(part.nbytes for part in read[row])
                if size <= self.budget:
                    mx.eval(read[row])
                    self._kept[row] = read[row]
                    self.budget -= size
        hidden, ids, shares = (
            mx.concatenate(list(parts)) for parts in zip(*(read[int(r)] for r in picks), strict=True)
        )
        return hidden, self.target.embed(mx.array(self.rows[picks])), ids, shares

    def _read(self, tokens: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        hidden, logits = self.target.forward(tokens, [None] * len(self.target.model.layers))
        assert hidden is not None  # the command refuses targets that give none
        ids, shares = teacher(logits, self.top_k)
        return hidden.astype(mx.bfloat16), ids, shares.astype(mx.float16)


def distillation_loss(
    drafter: RecurrentDrafter,
    hidden: mx.array,
    embeddings: mx.array,
    ids: mx.array,
    shares: mx.array,
    step_weights: list[float],
    dtype: mx.Dtype = mx.float32,
) -> tuple[mx.array, mx.array]:
    """Unrolls the recurrence over every position and compares each step with the target.

    Args:
        hidden, embeddings, ids, shares: from a `TeacherReader`.
        step_weights: weight of step k, K of them.

    Returns:
        the weighted mean cross-entropy in nats, and the share of positions, (K,), where
        the head's first guess at step k is the target's.
    """
    steps = len(step_weights)
    positions = hidden.shape[1] - steps
    context = drafter.project_context(hidden[:, :positions].astype(dtype))
    state = None
    losses: list[mx.array] = []
    hits: list[mx.array] = []
    for k in range(1, steps + 1):
        state = drafter.advance(embeddings[:, k : k + positions].astype(dtype), state)
        logits = drafter.logits(context, state).astype(mx.float32)
        logits = logits.reshape(-1, logits.shape[-1])
        step_ids = ids[:, k : k + positions].reshape(logits.shape[0], -1)
        step_shares = shares[:, k : k + positions].reshape(logits.shape[0], -1).astype(mx.float32)
        entropy: Any = soft_cross_entropy(logits, step_ids, step_shares)
        losses.append(mx.mean(entropy) * step_weights[k - 1])
        best = mx.take_along_axis(step_ids, mx.argmax(step_shares, axis=-1, keepdims=True), axis=-1)[:, 0]
        hits.append(mx.mean(mx.equal(mx.argmax(logits, axis=-1), best)))
    return mx.sum(mx.stack(losses)) / sum(step_weights), mx.stack(hits)
