"""A step's tree and choices under a constraint. Knows nothing of grammars, nor of how the target chooses.

The host reads what was drafted before it is verified, prunes it, and makes the masks while the
device verifies. As with logits processors, a step can be built only when the last one has been read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_redrafter.constraints.matcher import Grown, Matcher
from mlx_redrafter.decoding.planner import Odds
from mlx_redrafter.drafting.shape import Drafted, Forced, Plain, Plan
from mlx_redrafter.target.tree import CandidateTree

FARTHEST = 15  # forced tokens in one step
FAR = 4  # so many need no drafter that cannot draft behind them: its chains are seldom accepted farther


def jump(matcher: Matcher, plan: Plan, behind: bool, odds: Odds) -> Plan:
    """What was planned, or what the grammar forces where that is far, or nothing else was planned.

    Args:
        behind: what is drafted can be drafted behind what is forced.
        odds: of the step's rows.
    """
    forced = len(matcher.forced(FARTHEST))
    if forced and behind and isinstance(plan, Drafted):
        pays = 1 + forced < len(odds.least) and odds.right[0] >= odds.least[1 + forced]
        return Drafted(plan.shape) if pays else Forced(forced)
    return Forced(forced) if forced >= (1 if isinstance(plan, Plain) else FAR) else plan


def prune(
    matcher: Matcher,
    tree: CandidateTree,
    plan: Plan,
    chain: bool,
    odds: Odds,
    root: mx.array,
    certain: Sequence[int] = (),
) -> tuple[CandidateTree, Grown]:
    """The rows that the grammar allows, and what it forces in the place of the others (batch size 1).

    Args:
        tree: as drafted; the host waits for it.
        plan: says how many rows there may be.
        chain: the target can verify only consecutive positions.
        odds: of its rows.
        root: (1,) the step's.
        certain: forced tokens behind the root, of which the last is the root of the tree.
    """
    tokens, parents, valid = (_host(array) for array in (tree.tokens, tree.parents, tree.valid))
    first = [*_host(root[None]), *certain[:-1]] if certain else []
    before = len(first)
    seats = {row: before + i for i, row in enumerate(row for row in range(tree.rows) if valid[row])}
    grown = matcher.grow(
        [*first, *(tokens[row] for row in seats)],
        [*(max(0, i - 1) for i in range(before + 1)), *(seats[parents[row]] for row in seats if row)],
        before + max(tree.rows, 1 + plan.num_draft_tokens),
        chain,
        odds.right,
        odds.least,
        before,
    )
    return CandidateTree.static(mx.array([grown.tokens], mx.int32), tuple(grown.parents)), grown


def mask_tree(matcher: Matcher, tree: CandidateTree, logits: mx.array) -> mx.array:
    """The logits (1, M, vocab) of a pruned tree, -inf for what the grammar forbids behind each row."""
    mx.async_eval(logits)  # the device verifies while the masks are made
    return masked(logits, matcher.allowed(_host(tree.tokens), _host(tree.parents)))


def mask_next(matcher: Matcher, logits: mx.array) -> mx.array:
    """The same for logits (1, vocab) of the token that comes next."""
    mx.async_eval(logits)
    return masked(logits, matcher.allowed([0], [0]))


def masked(logits: mx.array, words: np.ndarray) -> mx.array:
    """Args: logits (..., vocab); words (rows, words) uint32, 32 tokens in each, the lowest bit the first."""
    bits = mx.array(words)[..., None] >> mx.arange(32, dtype=mx.uint32)
    allowed = (bits & 1).reshape(words.shape[0], -1)[:, : logits.shape[-1]].astype(mx.bool_)
    return mx.where(allowed.reshape(logits.shape), logits, mx.array(-mx.inf, logits.dtype))


def _host(row: mx.array) -> list[Any]:
    values: Any = row[0].tolist()
    return values
