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
) -> Grown:
    """The rows that the grammar allows, and what it forces in the place of the others (batch size 1).

    Args:
        tree: as drafted; the host waits for it.
        plan: says how many rows there may be.
        chain: the target can verify only consecutive positions.
        odds: of its rows.
        root: (1,) the step's.
        certain: forced tokens behind the root, of which the last is the root of the tree.
    """
    known: Any = [tree.tokens[0], tree.parents[0], tree.valid[0], root]
    mx.eval(known)  # together, so that the host waits once
    tokens, parents, valid, before_it = (array.tolist() for array in known)
    first = [*before_it, *certain[:-1]] if certain else []
    before = len(first)
    seats = {row: before + i for i, row in enumerate(row for row in range(tree.rows) if valid[row])}
    return matcher.grow(
        [*first, *(tokens[row] for row in seats)],
        [*(max(0, i - 1) for i in range(before + 1)), *(seats[parents[row]] for row in seats if row)],
        before + max(tree.rows, 1 + plan.num_draft_tokens),
        chain,
        odds.right,
        odds.least,
        before,
    )


def mask(matcher: Matcher, logits: mx.array, tokens: Sequence[int] = (0,), parents: Sequence[int] = (0,)) -> mx.array:
    """Logits with -inf for what the grammar forbids behind each row.

    Args:
        logits: (1, M, vocab), or (1, vocab) for the token that comes next.
        tokens, parents: of M rows. They are the host's: one value of the device, and all waits for the verification.
    """
    mx.async_eval(logits)  # the device verifies while the masks are made
    return masked(logits, matcher.allowed(tokens, parents))


def masked(logits: mx.array, words: np.ndarray) -> mx.array:
    """Args: logits (..., vocab); words (rows, words) uint32, 32 tokens in each, the lowest bit the first.

    The host takes the bits apart, too, as the device would do it behind the verification.
    """
    bits = np.unpackbits(words.view(np.uint8), axis=1, count=logits.shape[-1], bitorder="little")
    return mx.where(mx.array(bits.view(np.bool_)).reshape(logits.shape), logits, mx.array(-mx.inf, logits.dtype))
