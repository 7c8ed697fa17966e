"""How often drafts are right: by depth, and by place among the siblings, from the steps so far.

Every share is a conditional one: of the steps that got to a node and had a child of that
rank there to check, how many took it. So steps of any shape tell about all others, and a
tree that ended early counts neither for nor against what it did not hold (Kaplan and
Meier's estimate, with depth in place of time).
"""

from __future__ import annotations

import dataclasses
import math

from mlx_redrafter.decoding.steering import Outcome

DEPTHS = 10  # beyond it the last one's share is assumed
RANKS = 8  # siblings that are told apart
FIRST = 0.65  # assumed share of right first choices
NEXT = (0.4, 0.3, 0.25, 0.2, 0.2, 0.15, 0.15)  # and of rank r = 1, 2, ... where all before it were wrong, if so
WEIGHT = 3.0  # steps that an assumption is worth
MEMORY = 192  # drafted steps after which an observation counts e times less


def later_assumed(first: float) -> list[float]:
    """Shares of later children where none was seen: a drafter whose first choice is poor has no good second one."""
    return [min(1.0, first / FIRST) * share for share in NEXT]


@dataclasses.dataclass
class Calibration:
    """Shares of right drafts with what they rest on.

    Attributes:
        right, tried: by depth, of the best child.
        later_right, later_tried: by rank from 1 on, over all depths.
        steps: drafted steps seen, forgotten ones included.
    """

    right: list[float] = dataclasses.field(default_factory=lambda: [0.0] * DEPTHS)
    tried: list[float] = dataclasses.field(default_factory=lambda: [0.0] * DEPTHS)
    later_right: list[float] = dataclasses.field(default_factory=lambda: [0.0] * (RANKS - 1))
    later_tried: list[float] = dataclasses.field(default_factory=lambda: [0.0] * (RANKS - 1))
    steps: int = 0

    def learn(self, outcome: Outcome) -> None:
        """Takes a step that drafted something."""
        self.fade(math.exp(-1 / MEMORY))
        self.steps += 1
        for depth, children in enumerate(outcome.children[: min(outcome.accepted + 1, DEPTHS)]):
            if children == 0:
                break
            taken = outcome.ranks[depth] if depth < outcome.accepted else children
            self.tried[depth] += 1
            self.right[depth] += taken == 0
            for rank in range(1, min(children, taken + 1, RANKS)):
                self.later_tried[rank - 1] += 1
                self.later_right[rank - 1] += taken == rank

    def fade(self, factor: float) -> None:
        """Makes all that was seen so far count less."""
        for counts in (self.right, self.tried, self.later_right, self.later_tried):
            counts[:] = [factor * value for value in counts]

    def first(self) -> list[float]:
        """Shares of right best children by depth; where little was seen, close to those one level up."""
        shares, assumed = [], FIRST
        for right, tried in zip(self.right, self.tried, strict=True):
            assumed = (right + WEIGHT * assumed) / (tried + WEIGHT)
            shares.append(assumed)
        return shares

    def later(self) -> list[float]:
        """Shares of right children of rank 1, 2, ... where all of lower rank were wrong."""
        assumed = later_assumed(self.first()[0])
        return [
            (right + WEIGHT * share) / (tried + WEIGHT)
            for right, tried, share in zip(self.later_right, self.later_tried, assumed, strict=True)
        ]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> Calibration:
        """Raises ValueError, TypeError or KeyError for what `to_dict` cannot have written."""
        found = cls(**fields)
        for right, tried, size in (
            (found.right, found.tried, DEPTHS),
            (found.later_right, found.later_tried, RANKS - 1),
        ):
            if len(right) != size or len(tried) != size or not all(0 <= r <= t for r, t in zip(right, tried)):
                raise ValueError("counts that are none")
        return found
