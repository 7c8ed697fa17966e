"""Counts how drafts fared, token by token; knows nothing of text."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from mlx_redrafter.decoding.step import Produced
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, LookedUp, Plan


@dataclasses.dataclass
class Statistics:
    """What the tokens so far say of the drafts.

    Attributes:
        steps: verifications that the text so far took.
        accepted: accepted[d - 1] is the number of steps that got at least d draft tokens in.
        plans: steps by what they drafted.
    """

    steps: int = 0
    accepted: list[int] = dataclasses.field(default_factory=list)
    plans: Counter[Plan] = dataclasses.field(default_factory=Counter)
    _in_step: int = 0  # tokens of the current step so far

    def count(self, produced: Produced) -> None:
        """Takes one token of a step; the one that follows the prompt came without a step."""
        if produced.from_prompt:
            return
        if self._in_step == 0:
            self.steps += 1
            self.plans[produced.plan] += 1
        else:
            if self._in_step > len(self.accepted):
                self.accepted.append(0)
            self.accepted[self._in_step - 1] += 1
        self._in_step = 0 if produced.last else self._in_step + 1

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per step, the target's own one included; 1.0 without drafts."""
        return 1 + sum(self.accepted) / self.steps if self.steps else 1.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of steps that got at least d draft tokens accepted, d = 1, 2, ..."""
        return [n / self.steps for n in self.accepted]

    @property
    def shape(self) -> DraftShape | None:
        """How much most of the steps of a drafter drafted; None where there were none."""
        own = Counter(plan.shape for plan in self.plans.elements() if isinstance(plan, Drafted))
        return max(own, key=lambda shape: own[shape], default=None)

    @property
    def plain_share(self) -> float:
        """Share of steps that drafted nothing."""
        return self.plans[PLAIN] / self.steps if self.steps else 0.0

    @property
    def lookup_share(self) -> float:
        """Share of steps that drafted only what lookup found."""
        found = sum(count for plan, count in self.plans.items() if isinstance(plan, LookedUp))
        return found / self.steps if self.steps else 0.0

    def figures(self) -> dict[str, Any]:
        """Those that a response has, by its fields' names."""
        return {name: getattr(self, name) for name in FIGURES}


FIGURES = (
    "steps",
    "mean_acceptance_length",
    "acceptance_by_position",
    "shape",
    "plain_share",
    "lookup_share",
)
