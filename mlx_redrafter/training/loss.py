"""Computes the distillation loss: a drafter's distribution at each step against the target's own.

From position t a drafter's step k = 1, 2, ... guesses the target's token after x_{t+k}. One
forward pass of the target gives both the hidden state h_t and its logits at position t + k
(paper, section 3.4). Knows nothing of a drafter's layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import mlx.core as mx

KL, LK, HARD, TEXT = "kl", "lk", "hard", "text"
LABELS = (KL, LK, HARD, TEXT)


def cross_entropy(logits: mx.array, shares: mx.array, ids: mx.array | None) -> mx.array:
    """-sum_j shares_j log softmax(logits)[ids_j], per row.

    Args:
        logits: (M, vocab) float32.
        shares: (M, k) float32 probabilities of the teacher's tokens, summing to 1.
        ids: (M, k) int32 these tokens; None where shares are of the whole vocabulary.

    Returns:
        (M,) in nats.
    """
    outputs: Any = _dense(logits, shares) if ids is None else _soft(logits, ids, shares)
    found: mx.array = outputs[0]
    return found


def acceptance_loss(cross_entropies: mx.array, logits: mx.array, shares: mx.array, ids: mx.array | None) -> mx.array:
    """The hybrid of "LK losses" (arXiv 2602.23881): a * cross-entropy + (1 - a) * (1 - overlap), a = exp(-3 overlap).

    The overlap, sum_j min(share_j, probability_j), is the probability that a sampled draft is
    accepted. Where it is small its gradient is, too, and the cross-entropy leads.

    Args:
        cross_entropies: (M,) of the same arguments, from `cross_entropy`.

    Returns:
        (M,).
    """
    scores = logits if ids is None else mx.take_along_axis(logits, ids, axis=-1)
    normaliser = cross_entropies + mx.sum(scores * shares, axis=-1)
    overlap = mx.sum(mx.minimum(shares, mx.exp(scores - normaliser[:, None])), axis=-1)
    mix = mx.stop_gradient(mx.exp(-3 * overlap))
    return mix * cross_entropies + (1 - mix) * (1 - overlap)


# The gradients are written out because with a vocabulary at every step and position this is
# where the time goes on a CPU: they use the exponentials of the forward pass again.


@mx.custom_function
def _soft(logits: mx.array, ids: mx.array, shares: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    log_sum, terms, total = _normaliser(logits)
    said = mx.sum(mx.take_along_axis(logits, ids, axis=-1) * shares, axis=-1)
    return log_sum - said, terms, total


@_soft.vjp
def _soft_vjp(primals, cotangents, outputs):
    _, ids, shares = primals
    _, terms, total = outputs
    along = cotangents[0][:, None]
    rows = mx.arange(ids.shape[0])[:, None]
    gradient = (terms * (along / total)).at[rows, ids].subtract(shares * along)
    return gradient, mx.zeros_like(ids), mx.zeros_like(shares)


@mx.custom_function
def _dense(logits: mx.array, shares: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    log_sum, terms, total = _normaliser(logits)
    return log_sum - mx.sum(logits * shares, axis=-1), terms, total


@_dense.vjp
def _dense_vjp(primals, cotangents, outputs):
    _, shares = primals
    _, terms, total = outputs
    return (terms / total - shares) * cotangents[0][:, None], mx.zeros_like(shares)


def _normaliser(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """log sum exp of each row (M,), and what it is made of: (M, vocab) terms and (M, 1) their sum."""
    most = mx.max(logits, axis=-1, keepdims=True)
    # MLX's CPU backend takes 7 ns for a power of two and 16 ns for exp; on a GPU they are equal.
    terms = mx.power(2.0, (logits - most) * (1 / math.log(2)))
    total = mx.sum(terms, axis=-1, keepdims=True)
    return (most + mx.log(total))[:, 0], terms, total


@dataclasses.dataclass(frozen=True)
class Objective:
    """The labels of the loss and the weights of its steps.

    Args:
        labels: "kl", the target's distribution; "lk", the same, by what of it would be accepted;
            "hard", its most probable token; "text", the token that follows in the text, whoever
            wrote it (Apple's training).
        top_k: with "kl" and "lk", tokens of the distribution that count, renormalised; 0 for all.
        temperature: of the target's distribution.
        step_weights: weight of each draft step in the loss; their number is the number of
            steps that are learned.
        step_shares: share of the positions at which step k is learned (a recurrence is unrolled
            as far as it), each at most the one before; a random choice in every update.
        candidates: tokens that a distribution is over, in every update those that its labels name and
            others at random (a sampled softmax, arXiv 1412.2007); 0 for all.
        prompts: prompts are learned like answers, but for what all rows begin with.
    """

    labels: str = KL
    top_k: int = 16
    temperature: float = 1.0
    step_weights: tuple[float, ...] = (1.0, 0.9, 0.81, 0.729)
    step_shares: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    candidates: int = 0
    prompts: bool = False

    @property
    def soft(self) -> bool:
        """Whether the labels are distributions."""
        return self.labels in (KL, LK)


@dataclasses.dataclass
class Batch:
    """What one update reads. Position i of step k is the i-th of a random order, so the
    positions of a step are the first n_k of those of the step before.

    Attributes:
        hidden: (n_1, context_size) the contexts h_t; empty for drafters that read whole rows.
        embeddings: for each step k, (n_k, hidden_size) of x_{t+k}; none at all for drafters
            that read no tokens.
        ids: for each step k, (n_k, j) int32 the teacher's tokens at position t + k, in the
            draft vocabulary, or among the candidates where there are any; none at all where `shares` covers all of it.
        shares: for each step k, (n_k, j) their probabilities.
        weights: for each step k, (n_k,) float32; 0 for what is not learned, the probability
            that the target gives to the draft vocabulary for what is.
        counts: (K,) how many positions the mean of step k is over, in all processes together.
        whole: for drafters that read all of a text up to a position: contexts (B, T, context_size), embeddings
            (B, T, hidden_size) of the token after each, and (n_1,) int32 which of the B T rows the positions
            are; else none at all.
        candidates: (C,) int32, alone in a list: draft tokens that scores are asked for; none at all where it is all.
        tokens: (B, T) int32, alone in a list, for drafters that read whole rows; else none at all.
    """

    hidden: mx.array
    embeddings: list[mx.array]
    ids: list[mx.array]
    shares: list[mx.array]
    weights: list[mx.array]
    counts: mx.array
    whole: list[mx.array] = dataclasses.field(default_factory=list)
    candidates: list[mx.array] = dataclasses.field(default_factory=list)
    tokens: list[mx.array] = dataclasses.field(default_factory=list)


def distillation_loss(
    scores: Iterable[mx.array], batch: Batch, step_weights: tuple[float, ...], labels: str = KL
) -> tuple[mx.array, mx.array]:
    """Compares what a drafter says at each step with the target.

    Args:
        scores: for step k, (n_k, scored) the drafter's, unnormalised.
        labels: as in `Objective`.

    Returns:
        the weighted mean loss, a cross-entropy in nats but for "lk", and the share of positions, (K,), where
        the drafter's first guess at step k is the target's.
    """
    losses: list[mx.array] = []
    hits: list[mx.array] = []
    for k, (weight, logits) in enumerate(zip(step_weights, scores, strict=True)):
        logits = logits.astype(mx.float32)
        shares = batch.shares[k].astype(mx.float32)
        best = mx.argmax(shares, axis=-1)
        ids = batch.ids[k] if batch.ids else None
        if ids is not None:
            best = mx.take_along_axis(ids, best[:, None], axis=-1)[:, 0]
        counted = batch.weights[k]
        loss = cross_entropy(logits, shares, ids)
        if labels == LK:
            loss = acceptance_loss(loss, logits, shares, ids)
        losses.append(mx.sum(loss * counted) / batch.counts[k] * weight)
        hit = mx.equal(mx.argmax(logits, axis=-1), best) * counted
        hits.append(mx.sum(hit) / batch.counts[k])
    return mx.sum(mx.stack(losses)) / sum(step_weights), mx.stack(hits)
