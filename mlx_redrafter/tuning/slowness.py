"""Tells a slow machine from a plan that is slow: both make steps take longer than computed.

Knows nothing of what plans are. The machine's part changes all the time and is common to whatever is at work; a
plan's own part stays. Steps of two plans close to one another tell their own parts apart, so a spell in which the
machine was slow does not stay with the plan that was in use meanwhile.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable

# Steps in a row of one plan that are looked at together, by their median, as some wait for something else; and the
# fewest that are: the last one before another plan waits for that plan's step to be built.
TOGETHER, FEWEST = 4, 3
MACHINE = 0.08  # by how much (of its logarithm) the machine's part changes from one look to the next
PAUSE = 0.2  # by how much more after a pause
NOISE = 0.15  # of a look
FARTHEST = 3.0  # standard deviations that a look counts at most: a reader may pause for as long as he likes
CHANGE = 0.004  # and a plan's own part


class Slowness:
    """Measured over computed seconds of steps, as the machine's part times the plan's own.

    The logarithms of the parts are followed by a Kalman filter, their sum being what is seen. Plain lists: beside a
    model at work, whose weights pass through all caches, a call of NumPy's takes longer than this arithmetic.

    """

    def __init__(self) -> None:
        self._places: dict[Hashable, int] = {}  # of the plans' parts; the machine's has place 0
        self._mean, self._covariance = [0.0], [[1.0]]
        self._plan: Hashable = None
        self._own = 1.0
        self._ratios: list[float] = []  # of its last steps, not looked at yet

    def learn(self, plan: Hashable, ratio: float, own: float) -> None:
        """Takes the measured over the computed seconds of a step.

        Args:
            own: standard deviation of the logarithm of the plan's own part, before any of its steps was seen.
        """
        if plan != self._plan:
            self._look()
            self._plan, self._own = plan, own
        self._ratios.append(ratio)
        if len(self._ratios) == TOGETHER:
            self._look()

    def pause(self) -> None:
        """Says that the next steps may find the machine faster or slower than the last ones did."""
        self._look()
        self._covariance[0][0] += PAUSE**2

    def of(self, plan: Hashable) -> float:
        """A plan's own part; 1 before its steps were looked at."""
        at = self._places.get(plan)
        return 1.0 if at is None else math.exp(self._mean[at])

    def at_best(self, plan: Hashable) -> float:
        """The same; of a plan of which no step was seen as if it alone were not slow."""
        return self.of(plan) if plan in self._places else min(1.0, math.exp(-self._mean[0]))

    def _look(self) -> None:
        ratios, self._ratios = self._ratios, []
        if len(ratios) < FEWEST:
            return
        seen = math.log(statistics.median(ratios))
        at = self._places.get(self._plan) or self._add()
        mean, covariance = self._mean, self._covariance
        for place, row in enumerate(covariance):
            row[place] += CHANGE**2 if place else MACHINE**2
        with_sum = [machine + own for machine, own in zip(covariance[0], covariance[at], strict=True)]
        variance = with_sum[0] + with_sum[at] + NOISE**2
        farthest = FARTHEST * math.sqrt(variance)
        surprise = max(-farthest, min(farthest, seen - mean[0] - mean[at]))
        for place, row in enumerate(covariance):
            gain = with_sum[place] / variance
            mean[place] += gain * surprise
            for other, value in enumerate(with_sum):
                row[other] -= gain * value

    def _add(self) -> int:
        at = self._places[self._plan] = len(self._mean)
        self._mean.append(0.0)
        for row in self._covariance:
            row.append(0.0)
        self._covariance.append([0.0] * at + [self._own**2])
        return at
