"""The table of what a step costs on one device: rows, drafting and plain steps, by tokens of context.

Knows nothing of how it was measured.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mlx_redrafter.drafting.shape import Drafted, Plain, Plan

Times = dict[int, dict[int, float]]


@dataclasses.dataclass
class Costs:
    """Seconds of the parts of a step.

    Attributes:
        verify: of one verification, by tokens of context, then by rows.
        plain: of a plain step, by tokens of context.
        draft: what a step takes beyond its rows (drafting, choosing nodes, accepting, moving
            rows together), by beam width, then by beam length; empty without a drafter.
    """

    verify: Times
    plain: dict[int, float]
    draft: Times

    def verify_seconds(self, rows: int, context: int) -> float:
        """Of one verification of so many rows."""
        return _line({at: _between(times, rows) for at, times in self.verify.items()}, context)

    def draft_seconds(self, width: int, length: int) -> float:
        """Of everything in a step but its rows."""
        return max(0.0, _between({w: _line(times, length) for w, times in self.draft.items()}, width))

    def step_seconds(self, plan: Plan, context: int) -> float:
        """Of a whole step behind so many tokens of context."""
        if isinstance(plan, Plain):
            return _line(self.plain, context)
        verifying = self.verify_seconds(1 + plan.num_draft_tokens, context)
        if isinstance(plan, Drafted):
            return verifying + self.draft_seconds(plan.shape.beam_width, plan.shape.beam_length)
        # A lookup costs what the shortest chain does, less the drafting of its tokens.
        if not self.draft:
            return verifying
        return verifying + max(0.0, _line(self.draft[min(self.draft)], 1, before=True))

    def batch_seconds(self, plan: Plan, texts: int, context: int) -> float:
        """Of a step of several texts, each behind so many tokens, computed from those of one text.

        All rows go through the weights together, and each text's through its own context. A drafter's beam over
        B texts is as wide as B beams.
        """
        rows, short = 1 + plan.num_draft_tokens, min(self.verify)
        times = self.verify[short]
        seconds = _between(times, texts * rows) + _beyond(times, texts * rows)
        seconds += texts * (self.verify_seconds(rows, context) - self.verify_seconds(rows, short))
        if isinstance(plan, Drafted) and self.draft:
            seconds += self.draft_seconds(texts * plan.shape.beam_width, plan.shape.beam_length)
        return seconds

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Costs:
        """Reads what `to_dict` gave, after JSON made its keys strings.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: anything else.
        """

        def table(times: dict[str, Any]) -> dict[int, float]:
            found = {int(at): float(seconds) for at, seconds in times.items()}
            if not found or not all(0 <= seconds < float("inf") for seconds in found.values()):
                raise ValueError(f"no times: {times}")
            return found

        verify = {int(context): table(times) for context, times in fields["verify"].items()}
        draft = {int(width): table(times) for width, times in fields["draft"].items()}
        if not verify:
            raise ValueError("no rows were measured")
        return cls(verify, table(fields["plain"]), draft)


def _between(times: dict[int, float], at: int) -> float:
    """On straight lines between measured points; as the nearest one outside of them."""
    points = sorted(times)
    return float(np.interp(at, points, [times[point] for point in points]))


def _beyond(times: dict[int, float], at: int) -> float:
    """What more rows than were measured take beyond the most that were: as much each as the last ones."""
    low, high = sorted(times)[-2:] if len(times) > 1 else (0, max(times))
    return max(0, at - high) * (times[high] - times.get(low, 0.0)) / (high - low)


def _line(times: dict[int, float], at: int, before: bool = False) -> float:
    """On the line through the first and the last point; flat before the first unless `before`.

    More never takes less: where it was measured to, the line is flat, or it would fall below zero far out.
    """
    low, high = min(times), max(times)
    if low == high:
        return times[low]
    share = (at - low) / (high - low)
    return times[low] + max(0.0, times[high] - times[low]) * (share if before else max(0.0, share))
