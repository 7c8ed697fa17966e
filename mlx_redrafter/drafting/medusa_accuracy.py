"""How often each rank of each Medusa head is right: what a static tree is fitted to."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from mlx_redrafter.drafting.beam_search import top
from mlx_redrafter.drafting.medusa import MedusaHeads
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.model import Target

RANKS = 10  # candidates of each head: as many as the published tree has


def rank_accuracies(
    target: Target,
    heads: MedusaHeads,
    rows: Iterable[Sequence[int]],
    ranks: int = RANKS,
    counted: Iterable[np.ndarray] | None = None,
) -> list[list[float]]:
    """Counts how often head k's r-th best token is the one that stands k + 2 places on.

    Args:
        target: one that gives hidden states.
        rows: texts as token ids, best such that the target wrote itself.
        ranks: candidates of each head.
        counted: for each text, which of its tokens count, bool; all if left out. A head is
            looked at where the token it guesses and those that come before it there count.

    Returns:
        [k][r] shares of the positions looked at, for `fit_choices`.

    Raises:
        UserError: no text is long enough for all heads, or none of its tokens count.
    """
    count = heads.config.medusa_num_heads
    ranks = min(ranks, heads.config.vocab_size)
    hits, seen = np.zeros((count, ranks)), np.zeros((count, 1))
    marks = itertools.repeat(None) if counted is None else counted
    for row, marked in zip(rows, marks, strict=False):
        positions = len(row) - count - 1
        if positions < 1:
            continue
        hidden, _ = target.forward(mx.array([list(row)], mx.int32), [None] * len(target.model.layers))
        assert hidden is not None
        logits = heads(hidden[0, :positions]).astype(mx.float32)
        best = top(logits.reshape(positions * count, -1), ranks)[0].reshape(positions, count, ranks)
        ahead = np.arange(positions)[:, None] + np.arange(2, count + 2)
        looked_at = np.ones(ahead.shape, bool) if marked is None else np.cumprod(marked[ahead], axis=1, dtype=bool)
        right = np.array(best) == np.asarray(row, np.int32)[ahead][..., None]
        hits += (right & looked_at[..., None]).sum(axis=0)
        seen += looked_at.sum(axis=0)[:, None]
    if not seen[0]:
        which = "" if counted is None else " and some of them to be learned"
        raise UserError(f"no text has more than {count + 1} tokens{which}, which {count} heads need to be measured")
    shares: list[list[float]] = (hits / np.maximum(1, seen)).tolist()
    return shares
