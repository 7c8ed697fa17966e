"""Says what each step of a text drafts, and is told how it went.

Knows nothing of what steps cost; `tuning` has a planner that adapts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from mlx_redrafter.drafting.shape import Plan


@dataclasses.dataclass
class StepRead:
    """One step as the host has read it (batch size 1).

    Attributes:
        plan: what it drafted.
        tokens: what it produced: the accepted drafts and the target's own choice after them.
        length: tokens in the KV cache after it.
        most: rows below one another that it checked, where they are not as many as the plan says.
        follows: what the planner of a batch has for this text.
        path, parents: of a tree, the rows of the accepted path, the root (row 0) first, and
            each row's parent; None where the rows are a chain.
        forced: places in `tokens` that a grammar forced: whoever drafted those was neither right nor wrong.
        certain: so many of the first places were forced before anybody drafted.
    """

    plan: Plan
    tokens: list[int]
    length: int
    path: list[int] | None = None
    parents: list[int] | None = None
    most: int | None = None
    forced: Collection[int] = ()
    certain: int = 0
    follows: Any = None


@dataclasses.dataclass(frozen=True)
class Odds:
    """How probable drafts are, and when one more row pays.

    Attributes:
        right: how often the best draft of a depth is right, from depth 1 on; the last holds for those below.
        least: from how probable a token on a row pays, by rows before it; of those beyond, none does.
    """

    right: tuple[float, ...] = (0.65,)
    least: tuple[float, ...] = (0.25,) * 16


class Planner:
    """Drafts the same in every step.

    Args:
        always: that plan.
    """

    def __init__(self, always: Plan):
        self.always = always

    def plan(self) -> Plan:
        """What the next step drafts; may be asked more than once for a step."""
        return self.always

    def odds(self) -> Odds:
        """Of the next step, for what a grammar adds to its drafts."""
        return Odds()

    def learn(self, step: StepRead) -> None:
        """Is told of every step as soon as it has been read."""


class BatchPlanner:
    """Drafts the same in every step of a batch.

    Args:
        always: that plan.
    """

    def __init__(self, always: Plan):
        self.always = always

    def follow(self, tokens: list[int]) -> Any:
        """Is told of a text that joins with these tokens; gets what it returns with each of the text's steps."""

    def plan(self, texts: int, length: int, follows: Sequence[Any] = ()) -> Plan:
        """What the next step drafts for each of so many texts, of which the longest has so many tokens.

        Args:
            follows: what `follow` returned for each of them.
        """
        return self.always

    def learn(self, steps: list[StepRead], timed: bool = True) -> None:
        """Is told how a step went for each of its texts that goes on or ends with it.

        Args:
            timed: whether nothing but steps has been done since it was told of the last one.
        """
