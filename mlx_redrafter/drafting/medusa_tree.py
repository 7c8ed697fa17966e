"""Medusa's static trees: which candidates of which heads are combined, and how a tree is fitted to text.

Knows nothing of files. A choice is a path of ranks: (0, 2) is the first head's best token followed by the second
head's third best. The tree is the same at every step; only its tokens change.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from mlx_redrafter.drafting.beam_search import top
from mlx_redrafter.drafting.drafter_files import DrafterBase
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.model import Target

Choice = tuple[int, ...]

MOST_RANKS = 64  # candidates of one head
RANKS = 10  # candidates of each head: as many as the published tree has

# The tree that Medusa's code uses if nothing else is said (`mc_sim_7b_63` in
# FasterDecoding/Medusa, fitted to Vicuna-7B, in the order in which it was grown); one digit
# is one rank.
_PUBLISHED = """
    0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003
    40 21 004 005 0000 011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021
    90 060 0001 16 070
"""
PUBLISHED: tuple[Choice, ...] = tuple(tuple(map(int, path)) for path in _PUBLISHED.split())


def fit_choices(accuracies: Sequence[Sequence[float]], count: int) -> tuple[Choice, ...]:
    """The tree of `count` nodes with the largest expected acceptance length.

    A node is accepted with the product of its ranks' accuracies, as though heads were
    independent, and adds that to the expected length; so the tree grows by the most
    accurate node that hangs on it, again and again (Medusa, arXiv 2401.10774, section 2.3.3).

    Args:
        accuracies: [k][r] the share of positions where the token k + 2 places on is the one
            that head k ranks r-th.
        count: nodes; fewer if there are not that many.

    Returns:
        choices in the order in which they were added, so the first n are the tree of n nodes.
    """
    chosen: list[Choice] = []
    waiting: list[tuple[float, Choice]] = [(-p, (rank,)) for rank, p in enumerate(accuracies[0])]
    heapq.heapify(waiting)
    while waiting and len(chosen) < count:
        negative, choice = heapq.heappop(waiting)
        chosen.append(choice)
        if len(choice) < len(accuracies):
            for rank, p in enumerate(accuracies[len(choice)]):
                heapq.heappush(waiting, (negative * p, (*choice, rank)))
    return tuple(chosen)


def rank_accuracies(
    target: Target,
    heads: DrafterBase,
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


def expected_length(accuracies: Sequence[Sequence[float]], choices: Sequence[Choice]) -> float:
    """The acceptance length that a tree should have: the target's own token and what each node adds.

    Args:
        accuracies: as for `fit_choices`.
    """
    return 1 + sum(math.prod(accuracies[k][rank] for k, rank in enumerate(choice)) for choice in choices)


def select(choices: Sequence[Choice], width: int, depth: int, count: int) -> tuple[Choice, ...]:
    """The first `count` choices that take no more than `width` candidates of each of `depth` heads."""
    return tuple(c for c in choices if len(c) <= depth and max(c) < width)[:count]


def parents_of(choices: Sequence[Choice]) -> tuple[int, ...]:
    """Rows of the parents, the root being row 0 and choice i row i + 1."""
    row = {(): 0} | {choice: i for i, choice in enumerate(choices, 1)}
    return (0, *(row[choice[:-1]] for choice in choices))


def check_choices(found: object, heads: int, source: str) -> tuple[Choice, ...]:
    """The key "medusa_choices" of a config.json. Raises UserError unless they make a tree for so many heads."""
    if not isinstance(found, (list, tuple)) or not found:
        raise UserError(f"{source}: medusa_choices is {found!r}, expected a list of paths")
    seen: set[Choice] = {()}
    for path in found:
        if (
            not isinstance(path, (list, tuple))
            or not 1 <= len(path) <= heads
            or not all(type(rank) is int and 0 <= rank < MOST_RANKS for rank in path)
        ):
            expected = f"1 to {heads} ranks from 0 to {MOST_RANKS - 1}"
            raise UserError(f"{source}: medusa_choices has the path {path!r}, expected {expected}")
        choice = tuple(path)
        if choice in seen or choice[:-1] not in seen:
            raise UserError(f"{source}: medusa_choices has the path {path!r} twice, or before the one it continues")
        seen.add(choice)
    return tuple(tuple(path) for path in found)
