"""Counts how drafts fared, token by token; knows nothing of text."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from mlx_redrafter.decoding.step import Produced
from mlx_redrafter.drafting.shape import PLAIN, Drafted, Forced, LookedUp, Plan


@dataclasses.dataclass
class Statistics:
    """What the tokens so far say of the drafts.

    Attributes:
        steps: verifications that the text so far took.
        drafts: rows that had been drafted and could be right or wrong.
        accepted: accepted[d - 1] is the number of steps that got at least d of them in.
        forced: tokens that a grammar forced, and that were verified with others.
        plans: steps by what they drafted; those that looked up in vain drafted nothing.
    """

    steps: int = 0
    drafts: int = 0
    forced: int = 0
    accepted: list[int] = dataclasses.field(default_factory=list)
    plans: Counter[Plan] = dataclasses.field(default_factory=Counter)
    _in_step: int = 0  # tokens of the current step so far
    _right: int = 0  # of them, drafts

    def count(self, produced: Produced) -> None:
        """Takes one token of a step; the one that follows the prompt came without a step."""
        if produced.from_prompt:
            return
        if self._in_step == 0:
            self.steps += 1
            self.drafts += produced.drafts
            found = produced.drafts or produced.forced or not isinstance(produced.plan, LookedUp)
            self.plans[produced.plan if found else PLAIN] += 1
            self._right = 0
        elif self._in_step - 1 in produced.forced:
            self.forced += 1
        else:
            if self._right == len(self.accepted):
                self.accepted.append(0)
            self.accepted[self._right] += 1
            self._right += 1
        self._in_step = 0 if produced.last else self._in_step + 1

    def figures(self) -> dict[str, Any]:
        """The fields of a response that they fill; shares are of the steps.

        Tokens per step count the target's own one, so they are 1.0 without drafts; the shape is
        the one that most steps of a drafter had, None where there were none.
        """
        steps = max(1, self.steps)
        shapes = Counter(plan.shape for plan in self.plans.elements() if isinstance(plan, Drafted))
        return {
            "steps": self.steps,
            "draft_tokens": self.drafts,
            "accepted_tokens": sum(self.accepted),
            "forced_tokens": self.forced,
            "mean_acceptance_length": 1 + (sum(self.accepted) + self.forced) / steps,
            "acceptance_by_position": [count / steps for count in self.accepted],
            "shape": next((shape for shape, _ in shapes.most_common(1)), None),
            "plain_share": self.plans[PLAIN] / steps,
            "lookup_share": sum(n for plan, n in self.plans.items() if isinstance(plan, LookedUp)) / steps,
            "forced_share": sum(n for plan, n in self.plans.items() if isinstance(plan, Forced)) / steps,
        }
