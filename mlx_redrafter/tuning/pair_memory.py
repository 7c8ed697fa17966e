"""Remembers how steps of a pair go on this device: what a step of each plan takes, and what trials lost.

Chooses nothing itself. A step takes what was computed beforehand, times how slow its plan is. Both a
slow machine and a slow plan make steps take longer than computed. The machine's part changes all the time and is
common to whatever is at work; a plan's own part stays. Steps of two plans close to one another tell their own parts
apart. So a spell in which the machine was slow does not stay with the plan that was in use meanwhile.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections import defaultdict
from collections.abc import Hashable

from mlx_redrafter.drafting.shape import PLAIN, Drafted, LookedUp, Plan
from mlx_redrafter.tuning.acceptance_model import AcceptanceModel, LookupMemory, RunningShare
from mlx_redrafter.tuning.step_costs import Costs

FIRST_GAP = 32  # steps before the first trial of a plan, and to the next one
COARSE = 64  # tokens of context that make no difference to a step's time
# Steps of one plan are looked at together, by their median, as some wait for something else. The last one before
# another plan waits for that plan's step to be built: fewer than so many say nothing.
TOGETHER, FEWEST = 4, 3
OLD = 16  # steps of other plans, after which a step that was not looked at yet is forgotten
# Standard deviations of logarithms. What may change from one look to the next: the machine's part, and a plan's own.
MACHINE, CHANGE = 0.08, 0.004
PAUSE = 0.2  # the machine's part in a pause
NOISE = 0.15  # of a look
FARTHEST = 3.0  # times its standard deviation that a look counts at most: readers pause for as long as they like


class Slowness:
    """Measured over computed seconds of steps, as the machine's part times the plan's own.

    The logarithms of the parts are followed by a Kalman filter, their sum being what is seen. It works on plain
    lists: beside a model at work, whose weights pass through all caches, a call of NumPy's takes longer.
    """

    def __init__(self) -> None:
        self._places: dict[Hashable, int] = {}  # of the plans' parts; the machine's has place 0
        self._mean, self._covariance = [0.0], [[1.0]]
        self._waiting: dict[Hashable, list[tuple[int, float]]] = defaultdict(list)  # steps and ratios, by plan
        self._steps = 0
        self._plan: Hashable = None
        self._own = 1.0

    def learn(self, plan: Hashable, ratio: float, own: float) -> None:
        """Takes the measured over the computed seconds of a step.

        Args:
            own: standard deviation of the logarithm of the plan's own part, before any of its steps was seen.
        """
        if plan != self._plan:
            if len(self._waiting[self._plan]) >= FEWEST:
                self._look()
            self._plan, self._own = plan, own
        self._steps += 1
        waiting = [(step, seen) for step, seen in self._waiting[plan] if self._steps - step <= OLD]
        self._waiting[plan] = [*waiting, (self._steps, ratio)]
        if len(waiting) + 1 == TOGETHER:
            self._look()

    def pause(self) -> None:
        """Says that the next steps may find the machine faster or slower than the last ones did."""
        self._waiting.clear()
        self._covariance[0][0] += PAUSE**2

    def of(self, plan: Hashable) -> float:
        """A plan's own part; 1 before its steps were looked at."""
        at = self._places.get(plan)
        return 1.0 if at is None else math.exp(self._mean[at])

    def at_best(self, plan: Hashable) -> float:
        """The same; for a plan never seen as if the machine were not slow, and only the other plans were."""
        return self.of(plan) if plan in self._places else min(1.0, math.exp(-self._mean[0]))

    def _look(self) -> None:
        seen = math.log(statistics.median(ratio for _, ratio in self._waiting.pop(self._plan)))
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


@functools.cache  # a batch asks for every plan in every step
def kind_of(plan: Plan) -> str:
    """What a plan shares its own slowness with: lookups of any length, or a shape with and without lookup beside it."""
    return str(plan.shape) if isinstance(plan, Drafted) else type(plan).__name__


class Arm:
    """A plan to choose, or a lookup, and how it went.

    Attributes:
        kind: what it shares its own slowness with, see `kind_of`.
        computed: seconds of a step as measured beforehand, by tokens of context.
        fit: of a tree, or beside a grammar, accepted over expected draft tokens.
        due, gap: the step from which on it may be tried again, and how long to wait after that.
    """

    def __init__(self, plan: Plan):
        self.plan, self.kind = plan, kind_of(plan)
        self.is_tree = isinstance(plan, Drafted) and plan.shape.beam_width > 1
        self.computed: dict[int, float] = {}
        self.fit = RunningShare(weight=8.0, memory=100.0)
        self.due = self.gap = FIRST_GAP


class PairMemory:
    """What is known of a pair on this device; outlives texts.

    Args:
        costs: measured beforehand.
        acceptance: how often the drafter was right.
        plans: those to choose from.

    Attributes:
        slowness: of each plan's steps.
        lookup: how lookups fared.
        structured: a grammar forces some tokens. They are no arm's, and take part of what a chain drafts.
        current: the arm that a text has put in use last; None before the first, and where it was plain decoding.
        steps: of all texts.
        elapsed, spent: seconds of all steps, and what trials lost, on a machine as fast as when it was measured.
    """

    def __init__(self, costs: Costs, acceptance: AcceptanceModel, plans: list[Plan]):
        self.costs, self.acceptance, self.lookup, self.structured = costs, acceptance, LookupMemory(), False
        self.arms = [Arm(plan) for plan in plans]
        self._arm_of = {arm.plan: arm for arm in self.arms}
        self._plain = self._arm_of.get(PLAIN) or Arm(PLAIN)
        self.slowness = Slowness()
        self.current: Arm | None = None
        self.steps, self.elapsed, self.spent = 0, 0.0, 0.0

    def arm(self, plan: Plan) -> Arm | None:
        """Where a plan's times are kept; None for one that is not among those to choose from, nor a lookup."""
        return self._lookup_arm(plan) if isinstance(plan, LookedUp) else self._arm_of.get(plan)

    def _lookup_arm(self, plan: LookedUp) -> Arm:
        if (arm := self._arm_of.get(plan)) is None:
            arm = self._arm_of[plan] = Arm(plan)
        return arm

    def lookup_seconds(self, tokens: int, length: int) -> float:
        """Of a lookup of so many tokens behind so many."""
        return self.seconds(self._lookup_arm(LookedUp(tokens)), length)

    def seconds(self, arm: Arm, length: int, at_best: bool = False) -> float:
        """Of a step behind so many tokens: as measured beforehand, times what is the plan's own since then.

        Args:
            at_best: that others take longer than computed is to say nothing of a plan that was never tried.
        """
        slowness = self.slowness.at_best if at_best else self.slowness.of
        return self.computed(arm, length) * slowness(arm.kind)

    def plain_seconds(self, length: int) -> float:
        """Of a plain step, as measured beforehand."""
        return self.computed(self._plain, length)

    def computed(self, arm: Arm, length: int) -> float:
        """Of a step, as measured beforehand."""
        if (seconds := arm.computed.get(length // COARSE)) is None:
            seconds = arm.computed[length // COARSE] = self.costs.step_seconds(arm.plan, length)
        return seconds
