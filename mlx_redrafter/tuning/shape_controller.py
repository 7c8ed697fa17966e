"""Chooses what every step drafts while a text is written, with plain decoding as the floor.

Knows nothing of how drafts are made. All it goes by is what the host reads anyway: the tokens,
which drafts were accepted, and when. The shape with the most expected tokens per second is in use. Now and
then another one is tried for a few steps, because what is not tried is not known; trials
cost a small share of all time, and one that did not help is waited for twice as long. What
the text has said before takes the shape's place, or joins its tree, where that should bring
more tokens per second still.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from mlx_redrafter.decoding.planner import Odds, Planner, StepRead
from mlx_redrafter.drafting.lookup import TextIndex
from mlx_redrafter.drafting.shape import ON, PLAIN, Drafted, Forced, LookedUp, Plan
from mlx_redrafter.tuning.acceptance_model import DEEPEST, AcceptanceModel, LookupFollower, LookupMemory
from mlx_redrafter.tuning.pair_memory import FIRST_GAP, Arm, PairMemory

BETTER = 1.02  # by how much another shape has to be faster to take over
CLOSE = 0.9  # of the speed in use, from which on a shape is worth a trial
BURST, LONGER = 6, 12  # steps of a trial, and steps more if they went better than what is in use
SHARE, ALLOWANCE = 0.01, 2.0  # of all time that trials may cost, beside so many plain steps
LARGEST_GAP = 4096  # steps between two trials of one shape
REVIEW = 4  # steps between reviews of plain steps and chains
TREES = 4  # reviews between those of trees, too, which take the host longer to expect
# How far (standard deviation of the logarithm) a plan's steps may be from as slow as others': shapes of drafts have
# most of a step in common, plain steps and lookups little.
OWN, OTHERS_OWN = 0.1, 0.3
MOST_ROWS = 24  # of a step with what a grammar forces
COUNTS = (1, 2, 3, 4, 5, 6, 7, 11, DEEPEST)  # tokens of a lookup, to choose from
LOOKUP_BETTER = 1.05  # by how much a lookup has to be faster than what would be drafted otherwise
JOINS = 1.0  # tokens of a lookup that should be right for it to join a tree


class LookupController(LookupFollower):
    """Chooses where one text (batch size 1) looks its drafts up in itself.

    Args:
        index: the text so far; whoever proposes extends it.
        mode: "auto", or "on" to look up wherever something is found.
        memory: of all texts of a pair.
        seconds: of a lookup of so many tokens behind so many.
        longest: tokens of a lookup at most.
    """

    def __init__(
        self,
        index: TextIndex,
        mode: str,
        memory: LookupMemory,
        seconds: Callable[[int, int], float],
        longest: int = DEEPEST,
    ):
        super().__init__(index, memory)
        self.mode = mode
        self._seconds = seconds
        self._longest, self._counts = longest, [count for count in COUNTS if count <= longest]

    def plan(self, plan: Plan, length: int, speed_of: Callable[[int], float]) -> Plan:
        """What was planned, or a lookup in its place or beside it where that should bring more tokens per second.

        Args:
            plan: what would be drafted otherwise.
            length: tokens in the KV cache.
            speed_of: tokens per second without lookup behind so many tokens.
        """
        kind = self.kind
        if self.mode == ON:
            if isinstance(plan, Drafted):
                return Drafted(plan.shape, with_lookup=True)
            return LookedUp(self._longest) if kind else plan
        if not kind:
            return plan
        right = self.memory.expected(kind)
        best, speed = plan, LOOKUP_BETTER * speed_of(length)
        for count in self._counts:
            if (rate := (1 + right[count]) / self._seconds(count, length)) > speed:
                best, speed = LookedUp(count), rate
        if best is plan and isinstance(plan, Drafted) and plan.shape.beam_width > 1:
            joins = right[min(plan.shape.beam_length - 1, DEEPEST)] > JOINS
            return Drafted(plan.shape, with_lookup=joins)
        return best


class Controller(Planner):
    """The planner of one text.

    Args:
        memory: shared by all texts of a pair.
        lookup: of this text; None does without.
        clock: seconds; not the machine's in tests.

    Attributes:
        acceptance: how often the drafter is right in this text.
        current: the arm in use.
    """

    def __init__(
        self,
        memory: PairMemory,
        lookup: LookupController | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.memory, self.lookup, self.clock = memory, lookup, clock
        self.acceptance = AcceptanceModel(above=memory.acceptance)
        self.current = memory.current or max(memory.arms, key=lambda arm: self.rate(0, arm))
        self._trial: Arm | None = None
        self._left = self._tokens = self._steps = 0  # of the trial
        self._prolonged = False
        self._last: Plan | str | None = None
        self._read_at, self._length = 0.0, 0
        self._reviews, self._next_review = 0, memory.steps + REVIEW

    def plan(self) -> Plan:
        plan = (self._trial or self.current).plan
        found = plan if self.lookup is None else self.lookup.plan(plan, self._length, self.rate)
        # A trial is of the drafter's own steps: in a text that repeats itself it would never end otherwise.
        return plan if self._trial is not None and isinstance(found, Drafted) else found

    def tokens(self, arm: Arm) -> float:
        """Expected tokens of a step, its own one included."""
        if not isinstance(arm.plan, Drafted):
            return 1.0
        expected = self.acceptance.expected(arm.plan.shape)
        return 1 + expected * (arm.fit.share(1.0) if self._fits(arm) else 1.0)

    def _fits(self, arm: Arm) -> bool:
        """Whether what an arm brings is learnt beside what is expected of it."""
        return arm.is_tree or self.memory.structured

    def rate(self, length: int, arm: Arm | None = None) -> float:
        """Expected tokens per second behind so many tokens, of the arm in use if none is given."""
        arm = arm or self.current
        return self.tokens(arm) / self.memory.seconds(arm, length)

    def odds(self) -> Odds:
        """When one more row pays: where it brings more tokens per second than the arm in use."""
        length = self._length
        speed = self.rate(length)
        seconds = [self.memory.costs.verify_seconds(rows, length) for rows in range(1, MOST_ROWS + 1)]
        least = tuple(max(0.0, more - less) * speed for less, more in itertools.pairwise(seconds))
        return Odds(tuple(self.acceptance.shares()[0]), (0.0, *least))

    def learn(self, step: StepRead) -> None:
        now = self.clock()
        seconds, self._read_at, self._length = now - self._read_at, now, step.length
        if self.lookup is not None:
            self.lookup.learn(step)
        if isinstance(step.plan, Forced) or len(step.forced) == len(step.tokens):
            return  # nobody was put to the test
        if self._last is None:
            self.memory.slowness.pause()
        arm = self.memory.arm(step.plan)
        kind = step.plan if arm is None else arm.kind
        # A step behind one of another kind has waited for it, or met cold caches.
        self._note(step, arm, seconds if kind == self._last else None)
        self._last = kind
        if isinstance(step.plan, LookedUp):
            return
        if self._trial is not None:
            if step.plan == self._trial.plan:
                self._count(self._trial, step)
        elif self.memory.steps >= self._next_review:
            self._reviews += 1
            trees = self._reviews % TREES == 0
            arms = [arm for arm in self.memory.arms if trees or not arm.is_tree or arm is self.current]
            if not self._review(arms, step.length) and (arm := self._worth_a_trial(arms, step.length)) is not None:
                self._trial, self._left, self._tokens, self._steps, self._prolonged = arm, BURST, 0, 0, False
            self._next_review = self.memory.steps + REVIEW

    def _note(self, step: StepRead, arm: Arm | None, seconds: float | None) -> None:
        """Keeps a step, and its time where that says something."""
        memory, length = self.memory, step.length
        memory.steps += 1
        if arm is None:  # lookup has joined a tree
            memory.elapsed += memory.costs.step_seconds(step.plan, length)
            return
        computed = memory.computed(arm, length)
        if seconds is not None and seconds > 0 < computed:  # a clock may be too coarse
            own = OWN if isinstance(arm.plan, Drafted) else OTHERS_OWN
            memory.slowness.learn(arm.kind, seconds / computed, own)
        usual = memory.seconds(arm, length)
        memory.elapsed += usual
        if isinstance(arm.plan, LookedUp):
            return
        tokens = len(step.tokens) - len(step.forced)
        if isinstance(arm.plan, Drafted):
            if self._fits(arm):
                arm.fit.learn(tokens - 1, self.acceptance.expected(arm.plan.shape))
            self.acceptance.learn(step)
        if arm is not self.current:
            memory.spent += max(0.0, usual - tokens / self.rate(length))

    def _review(self, arms: list[Arm], length: int) -> bool:
        """Puts the best arm in use; True if that is another one."""
        best = max(arms, key=lambda arm: self.rate(length, arm))
        if best is self.current or self.rate(length, best) <= BETTER * self.rate(length):
            return False
        self.current, before = best, self.current
        # Texts that follow one another are often alike; but plain steps show nothing of the drafter.
        self.memory.current = None if best.plan == PLAIN else best
        before.due = self.memory.steps + before.gap
        return True

    def _worth_a_trial(self, arms: list[Arm], length: int) -> Arm | None:
        """An arm to try now, the one that has waited longest."""
        memory, speed = self.memory, self.rate(length)
        left = SHARE * memory.elapsed + ALLOWANCE * memory.plain_seconds(length) - memory.spent
        others = [arm for arm in arms if arm is not self.current]
        if self.current.plan == PLAIN:  # the best of the drafted ones, however poor it looks: texts change
            others = sorted(others, key=lambda arm: -self.rate(length, arm))[:1]

        def pays(arm: Arm) -> bool:
            both_draft = PLAIN not in (self.current.plan, arm.plan)
            if both_draft and self.rate(length, arm) <= CLOSE * speed:
                return False
            seconds = memory.seconds(arm, length, at_best=arm.plan == PLAIN)
            # One more step is on its way when the last is read.
            return (BURST + 1) * (seconds - self.tokens(arm) / speed) <= left

        found = (arm for arm in others if memory.steps >= arm.due and pays(arm))
        return min(found, key=lambda arm: arm.due, default=None)

    def _count(self, arm: Arm, step: StepRead) -> None:
        """One more step of a trial; decides at its end."""
        memory, length = self.memory, step.length
        tokens = len(step.tokens) - len(step.forced)
        self._left, self._tokens, self._steps = self._left - 1, self._tokens + tokens, self._steps + 1
        if self._left:
            return
        speed = self._tokens / (self._steps * memory.seconds(arm, length))
        if arm.plan != PLAIN and not self._prolonged and speed > self.rate(length):
            self.acceptance.fade(0.25)  # what was seen long ago would take long to outvote
            self._prolonged, self._left = True, LONGER
            return
        self._trial = None
        arm.gap = FIRST_GAP if self._review(memory.arms, length) else min(2 * arm.gap, LARGEST_GAP)
        arm.due = memory.steps + arm.gap
        self._next_review = memory.steps + REVIEW
