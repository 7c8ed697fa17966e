"""Chooses what every step drafts while a text is written, with plain decoding as the floor.

Knows nothing of text. All it goes by is what the host reads anyway: which drafts were
accepted, and when. The shape with the most expected tokens per second is in use. Now and
then another one is tried for a few steps, because what is not tried is not known; trials
cost a small share of all time, and one that did not help is waited for twice as long.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable

from mlx_redrafter.decoding.planner import Odds, Planner, StepRead
from mlx_redrafter.drafting.shape import PLAIN, Drafted, Forced, LookedUp, Plan
from mlx_redrafter.tuning.acceptance_model import AcceptanceModel, RunningShare
from mlx_redrafter.tuning.lookup_controller import LookupController, LookupMemory
from mlx_redrafter.tuning.step_costs import Costs

BETTER = 1.02  # by how much another shape has to be faster to take over
CLOSE = 0.9  # of the speed in use, from which on a shape is worth a trial
BURST, LONGER = 6, 12  # steps of a trial, and steps more if they went better than what is in use
SHARE, ALLOWANCE = 0.01, 2.0  # of all time that trials may cost, beside so many plain steps
FIRST_GAP, LARGEST_GAP = 32, 4096  # steps between two trials of one shape
EARLY, USUAL = 4, 16  # steps between reviews, at first and later
TIMES, TRUSTED = 32, 5  # measured times of a shape that count, and those from which on no others do
MOST_ROWS = 24  # of a step with what a grammar forces
COARSE = 64  # tokens of context that make no difference to a step's time


class RecentMedian:
    """The median of the last values.

    Args:
        size: how many.
    """

    def __init__(self, size: int):
        self.values: deque[float] = deque(maxlen=size)
        self._median: float | None = None

    def learn(self, value: float) -> None:
        self.values.append(value)
        self._median = None

    def value(self, assumed: float, trusted: int) -> float:
        """The median; while there are fewer values than are trusted, drawn towards what is assumed."""
        if not self.values:
            return assumed
        if self._median is None:
            self._median = statistics.median(self.values)
        trust = min(1.0, len(self.values) / trusted)
        return trust * self._median + (1 - trust) * assumed


class Arm:
    """A plan to choose, and how it went.

    Attributes:
        slowness: measured over expected seconds.
        fit: of a tree, accepted over expected draft tokens.
        due, gap: the step from which on it may be tried again, and how long to wait after that.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.slowness, self.fit = RecentMedian(TIMES), RunningShare(weight=8.0, memory=100.0)
        self.due = self.gap = FIRST_GAP


class PairMemory:
    """What is known of a pair on this device; outlives texts.

    Args:
        costs: measured beforehand.
        acceptance: how often the drafter was right.
        plans: those to choose from.

    Attributes:
        current: the arm in use.
        lookup: how lookups fared.
        structured: a grammar forces some tokens. They are no arm's, and take part of what a chain drafts.
    """

    def __init__(self, costs: Costs, acceptance: AcceptanceModel, plans: list[Plan]):
        self.costs, self.acceptance, self.lookup, self.structured = costs, acceptance, LookupMemory(), False
        self.arms = [Arm(plan) for plan in plans]
        self._found = Arm(LookedUp(1))  # lookups of any length
        self._drift = RecentMedian(2 * TIMES)  # of all arms
        self._expected: dict[tuple[Plan, int], float] = {}
        self.steps, self.elapsed, self.spent = 0, 0.0, 0.0  # seconds of all steps, and what trials lost
        self.current = max(self.arms, key=lambda arm: self.rate(0, arm))

    def arm(self, plan: Plan) -> Arm | None:
        """Where a plan's times are kept; None for one that is not among those to choose from."""
        if isinstance(plan, LookedUp):
            return self._found
        return next((arm for arm in self.arms if arm.plan == plan), None)

    def seconds(self, plan: Plan, length: int, arm: Arm | None = None) -> float:
        """Of a step behind so many tokens: as lately measured, and while that is little, as slow as other steps are."""
        arm = arm or self.arm(plan)
        drift = self._drift.value(1.0, TRUSTED)
        return self._table(plan, length) * (drift if arm is None else arm.slowness.value(drift, TRUSTED))

    def _table(self, plan: Plan, length: int) -> float:
        key = plan, length // COARSE
        if (seconds := self._expected.get(key)) is None:
            seconds = self._expected[key] = self.costs.step_seconds(plan, length)
        return seconds

    def tokens(self, arm: Arm) -> float:
        """Expected tokens of a step, its own one included."""
        if not isinstance(arm.plan, Drafted):
            return 1.0
        expected = self.acceptance.expected(arm.plan.shape)
        fits = arm.plan.shape.beam_width > 1 or self.structured
        return 1 + expected * (arm.fit.share(1.0) if fits else 1.0)

    def rate(self, length: int, arm: Arm | None = None) -> float:
        """Expected tokens per second behind so many tokens, of the arm in use if none is given."""
        arm = arm or self.current
        return self.tokens(arm) / self.seconds(arm.plan, length, arm)

    def odds(self, length: int) -> Odds:
        """When one more row pays behind so many tokens: where it brings more tokens per second than the arm in use."""
        slow, speed = self._drift.value(1.0, TRUSTED), self.rate(length)
        seconds = [self.costs.verify_seconds(rows, length) * slow for rows in range(1, MOST_ROWS + 1)]
        least = tuple(max(0.0, more - less) * speed for less, more in itertools.pairwise(seconds))
        return Odds(tuple(self.acceptance.shares()[0]), (0.0, *least))

    def note(self, step: StepRead, seconds: float | None) -> None:
        """A step, and its time where that says something."""
        self.steps += 1
        arm = self.arm(step.plan)
        if arm is not None and seconds is not None:
            ratio = seconds / self._table(step.plan, step.length)
            arm.slowness.learn(ratio)
            if arm is not self._found:  # whose table is an assumption
                self._drift.learn(ratio)
        usual = self.seconds(step.plan, step.length, arm)
        self.elapsed += usual
        if arm is None or isinstance(step.plan, LookedUp):
            return
        tokens = len(step.tokens) - len(step.forced)
        if isinstance(step.plan, Drafted):
            arm.fit.learn(tokens - 1, self.acceptance.expected(step.plan.shape))
            self.acceptance.learn(step)
        if arm is not self.current:
            self.spent += max(0.0, usual - tokens / self.rate(step.length))

    def review(self, length: int) -> bool:
        """Puts the best arm in use; True if that is another one."""
        best = max(self.arms, key=lambda arm: self.rate(length, arm))
        if best is self.current or self.rate(length, best) <= BETTER * self.rate(length):
            return False
        self.current, before = best, self.current
        before.due = self.steps + before.gap
        return True

    def trial(self, length: int) -> Arm | None:
        """An arm to try now, the one that has waited longest."""
        speed = self.rate(length)
        left = SHARE * self.elapsed + ALLOWANCE * self._table(PLAIN, length) - self.spent
        others = [arm for arm in self.arms if arm is not self.current]
        if self.current.plan == PLAIN:  # the best of the drafted ones, however poor it looks: texts change
            others = sorted(others, key=lambda arm: -self.rate(length, arm))[:1]
        else:
            others = [arm for arm in others if arm.plan == PLAIN or self.rate(length, arm) > CLOSE * speed]

        def loss(arm: Arm) -> float:  # one more is on its way when the last is read
            # That other arms are slow says little of one that was never tried, plain steps above all.
            seconds = self.seconds(arm.plan, length, arm) if arm.slowness.values else self._table(arm.plan, length)
            return (BURST + 1) * (seconds - self.tokens(arm) / speed)

        found = [arm for arm in others if self.steps >= arm.due and loss(arm) <= left]
        return min(found, key=lambda arm: arm.due, default=None)


class Controller(Planner):
    """The planner of one text.

    Args:
        memory: shared by all texts of a pair.
        lookup: of this text; None does without.
        clock: seconds; not the machine's in tests.
    """

    def __init__(
        self,
        memory: PairMemory,
        lookup: LookupController | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.memory, self.lookup, self.clock = memory, lookup, clock
        self._trial: Arm | None = None
        self._left = self._tokens = self._steps = 0  # of the trial
        self._prolonged = False
        self._last: Arm | None = None
        self._read_at, self._length = 0.0, 0
        self._next_review = memory.steps + EARLY

    def plan(self) -> Plan:
        plan = (self._trial or self.memory.current).plan
        found = plan if self.lookup is None else self.lookup.plan(plan, self._length)
        # A trial is of the drafter's own steps: in a text that repeats itself it would never end otherwise.
        return plan if self._trial is not None and isinstance(found, Drafted) else found

    def odds(self) -> Odds:
        return self.memory.odds(self._length)

    def learn(self, step: StepRead) -> None:
        memory, now = self.memory, self.clock()
        seconds, self._read_at, self._length = now - self._read_at, now, step.length
        if self.lookup is not None:
            self.lookup.learn(step)
        if isinstance(step.plan, Forced) or len(step.forced) == len(step.tokens):
            return  # nobody was put to the test
        kind = memory.arm(step.plan)
        # A step behind one of another kind has waited for it, or met cold caches.
        memory.note(step, seconds if kind is self._last else None)
        self._last = kind
        if isinstance(step.plan, LookedUp):
            return
        if self._trial is not None:
            if step.plan == self._trial.plan:
                self._count(self._trial, step)
        elif memory.steps >= self._next_review:
            if not memory.review(step.length) and (arm := memory.trial(step.length)) is not None:
                self._trial, self._left, self._tokens, self._steps, self._prolonged = arm, BURST, 0, 0, False
            self._next_review = memory.steps + (EARLY if memory.acceptance.steps < USUAL else USUAL)

    def _count(self, arm: Arm, step: StepRead) -> None:
        """One more step of a trial; decides at its end."""
        memory, length = self.memory, step.length
        tokens = len(step.tokens) - len(step.forced)
        self._left, self._tokens, self._steps = self._left - 1, self._tokens + tokens, self._steps + 1
        if self._left:
            return
        speed = self._tokens / (self._steps * memory.seconds(arm.plan, length, arm))
        if arm.plan != PLAIN and not self._prolonged and speed > memory.rate(length):
            memory.acceptance.fade(0.25)  # what was seen long ago would take long to outvote
            self._prolonged, self._left = True, LONGER
            return
        self._trial = None
        arm.gap = FIRST_GAP if memory.review(length) else min(2 * arm.gap, LARGEST_GAP)
        arm.due = memory.steps + arm.gap
        self._next_review = memory.steps + USUAL
