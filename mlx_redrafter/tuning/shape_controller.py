"""Chooses the shape of every step while a text is written, and plain decoding where drafting does not pay.

All it goes by is what the host reads anyway: how many drafts were accepted, which ones, and
when. Now and then it tries another shape (plain decoding while it drafts, drafting while it
decodes plainly) for a few steps, because what is not tried is not known; what trials may
cost is a small share of all time, and one that did not help is waited for twice as long.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import deque
from collections.abc import Callable

from mlx_redrafter.decoding.steering import Outcome
from mlx_redrafter.drafting.shape import DraftShape, LookupChain
from mlx_redrafter.tuning.calibration import Calibration
from mlx_redrafter.tuning.expectation import Expectation
from mlx_redrafter.tuning.lookup_controller import LookupMemory
from mlx_redrafter.tuning.step_costs import Costs

BURST = 4  # steps of a trial
LONGER = 12  # steps more if they went better than what is in use
SHARE = 0.015  # of all time that trials may cost, beside
ALLOWANCE = 2.0  # plain steps' time
BETTER = 1.03  # by how much another shape has to be faster to take over
CLOSE = 0.9  # of the best one's speed, from which on a shape is worth a trial
FIRST_GAP, LARGEST_GAP = 48, 4096  # steps between two trials of one shape
EARLY, EARLY_STEPS, USUAL = 4, 12, 16  # steps between reviews, at first and later
TIMES = 16  # measured times of a shape that count
FORGET = 0.99  # of what was accepted from a tree of one shape, per step of it
FIT_WEIGHT = 8.0  # draft tokens that the assumption about a shape is worth
COARSE = 64  # tokens of context that make no difference to a step's time
TRUSTED = 8  # measured times of a shape, from which on those of others do not count
STALE = 1024  # steps after which a measured time does not count any more


LOOKUP = LookupChain.of(1)  # stands for lookups of any length where times are kept


def _kind(shape: DraftShape | None) -> DraftShape | None:
    return LOOKUP if isinstance(shape, LookupChain) else shape


@dataclasses.dataclass
class Waiting:
    """When a shape may be tried again, in steps, and how long to wait after that."""

    until: int = FIRST_GAP
    gap: int = FIRST_GAP


@dataclasses.dataclass
class _Fit:
    """What was accepted over what was expected, of the last steps."""

    accepted: float = 0.0
    expected: float = 0.0

    def learn(self, accepted: int, expected: float) -> None:
        self.accepted = FORGET * self.accepted + accepted
        self.expected = FORGET * self.expected + expected

    def factor(self, assumed: float = 1.0) -> float:
        """Close to what is assumed as long as little was seen."""
        return min(2.0, max(0.5, (self.accepted + FIT_WEIGHT * assumed) / (self.expected + FIT_WEIGHT)))


class Memory:
    """What is known of a pair; outlives texts.

    Attributes:
        costs: measured beforehand.
        calibration: how often drafts were right.
        shapes: those to choose from; None, plain decoding, is always one of them.
        current: the one in use; best by what is known, until something better is found.
        lookup: how lookups fared beside the drafter.
    """

    def __init__(self, costs: Costs, calibration: Calibration, shapes: list[DraftShape]):
        self.costs, self.calibration = costs, calibration
        self.shapes: list[DraftShape | None] = [None, *shapes]
        self.current: DraftShape | None = None
        self.lookup = LookupMemory()
        self.steps = 0
        self.elapsed = self.spent = 0.0  # seconds of all steps, and what trials lost, as estimated
        self.waiting = {shape: Waiting() for shape in self.shapes}
        # Of each shape: measured over expected time, with the step at which it was measured.
        self.ratios: dict[DraftShape | None, deque[tuple[int, float]]] = {
            shape: deque(maxlen=TIMES) for shape in [*self.shapes, LOOKUP]
        }
        self._drift: deque[float] = deque(maxlen=2 * TIMES)  # of any shape of the drafter's
        # Every step asks for several of these while the device may be waiting.
        self._slowness: dict[DraftShape | None, float] = {}
        self._expected: dict[tuple[DraftShape | None, int], float] = {}
        # Accepted drafts of trees, as seen and as expected: of each shape, and of all (None).
        self._fits = {shape: _Fit() for shape in self.shapes}
        self.review(0)

    def note_time(self, shape: DraftShape | None, seconds: float, length: int) -> None:
        """A step's measured time behind `length` tokens."""
        ratio = seconds / self._table(shape, length)
        self.ratios[_kind(shape)].append((self.steps, ratio))
        if not isinstance(shape, LookupChain):
            self._drift.append(ratio)  # lookup's table is an assumption, and no drafter's
        self._slowness.clear()

    def note_outcome(self, outcome: Outcome) -> None:
        """A step's accepted drafts."""
        if outcome.shape is None:
            return
        self.calibration.learn(outcome)
        if outcome.shape.beam_width > 1:
            # Nodes are chosen step by step, by what the drafter makes of each: better than
            # shares by rank say, or worse.
            expected = self._expectation.accepted(outcome.shape)
            for shape in (outcome.shape, None):
                self._fits[shape].learn(outcome.accepted, expected)

    def review(self, length: int) -> bool:
        """Puts the best shape in use; True if that is another one."""
        self._expectation = Expectation(self.calibration.first(), self.calibration.later())
        self._slowness.clear()  # some of it may be stale
        best = max(self.shapes, key=lambda shape: self.rate(shape, length))
        if best != self.current and self.rate(best, length) > BETTER * self.rate(self.current, length):
            self.current = best
            return True
        return False

    def seconds(self, shape: DraftShape | None, length: int) -> float:
        """Of a step: as lately measured, and while that is little, as much slower or faster as other shapes are."""
        kind = _kind(shape)
        if (slowness := self._slowness.get(kind)) is None:
            own = [ratio for step, ratio in self.ratios[kind] if self.steps - step <= STALE]
            others = statistics.median(self._drift) if len(self._drift) >= 8 else 1.0
            # A few times of its own may have met another program; a shape that they make look
            # slow would not be tried again for long.
            trust = min(1.0, len(own) / TRUSTED)
            slowness = trust * statistics.median(own) + (1 - trust) * others if own else others
            self._slowness[kind] = slowness
        return self._table(shape, length) * slowness

    def _table(self, shape: DraftShape | None, length: int) -> float:
        """Seconds of a step as measured beforehand."""
        key = shape, length // COARSE
        if (seconds := self._expected.get(key)) is None:
            seconds = self._expected[key] = self.costs.step_seconds(shape, length)
        return seconds

    def tokens(self, shape: DraftShape | None) -> float:
        """Expected tokens of a step, its own one included."""
        if shape is None:
            return 1.0
        expected = self._expectation.accepted(shape)
        if shape.beam_width == 1:
            return 1 + expected
        return 1 + expected * self._fits[shape].factor(assumed=self._fits[None].factor())

    def rate(self, shape: DraftShape | None, length: int) -> float:
        """Expected tokens per second behind `length` tokens."""
        return self.tokens(shape) / self.seconds(shape, length)

    def speed(self, length: int) -> float:
        """Expected tokens per second of the shape in use."""
        return self.rate(self.current, length)

    def due(self, length: int) -> list[DraftShape | None]:
        """Shapes to try now, the one that has waited longest first."""
        speed = self.speed(length)
        others = [shape for shape in self.shapes if shape != self.current]
        if self.current is None:
            others = sorted(others, key=lambda shape: -self.rate(shape, length))[:1]
        else:
            others = [s for s in others if s is None or self.rate(s, length) > CLOSE * speed]
        left = SHARE * self.elapsed + ALLOWANCE * self.seconds(None, length) - self.spent

        def affordable(shape: DraftShape | None) -> bool:
            loss = self.seconds(shape, length) - self.tokens(shape) / speed
            return (BURST + 1) * loss <= left  # one more is on its way when the last is read

        found = [shape for shape in others if self.steps >= self.waiting[shape].until and affordable(shape)]
        return sorted(found, key=lambda shape: self.waiting[shape].until)


@dataclasses.dataclass
class _Trial:
    """A few steps of another shape."""

    shape: DraftShape | None
    left: int = BURST
    steps: int = 0
    tokens: int = 0
    prolonged: bool = False


class Adaptation:
    """The steering of one text (see `steering.Steering`).

    Args:
        memory: shared by all texts of a pair.
        clock: seconds; not the machine's in tests.
    """

    def __init__(self, memory: Memory, clock: Callable[[], float] = time.perf_counter):
        self.memory, self.clock = memory, clock
        self._trial: _Trial | None = None
        self._last: list[DraftShape | None] = []  # the shape of the step read last, if there was one
        self._read_at = 0.0
        self._next_review = memory.steps + EARLY

    def begin(self) -> None:
        self._read_at = self.clock()

    def shape(self) -> DraftShape | None:
        return self.memory.current if self._trial is None else self._trial.shape

    def learn(self, outcome: Outcome, length: int) -> None:
        memory, shape, now = self.memory, outcome.shape, self.clock()
        seconds, self._read_at = now - self._read_at, now
        memory.steps += 1
        # A step behind one of another shape has waited for it, or met cold caches.
        if self._last == [_kind(shape)]:
            memory.note_time(shape, seconds, length)
        self._last = [_kind(shape)]
        usual = memory.seconds(shape, length)
        memory.elapsed += usual
        if isinstance(shape, LookupChain):
            return  # tells nothing of the drafter, and was not chosen here
        memory.note_outcome(outcome)
        if shape != memory.current:
            memory.spent += max(0.0, usual - (1 + outcome.accepted) / memory.rate(memory.current, length))
        if self._trial is not None:
            if shape == self._trial.shape:
                self._count(self._trial, outcome, length)
        elif memory.steps >= self._next_review:
            self._review(length)

    def _count(self, trial: _Trial, outcome: Outcome, length: int) -> None:
        """One more step of a trial; decides at its end."""
        memory = self.memory
        trial.steps, trial.tokens, trial.left = trial.steps + 1, trial.tokens + 1 + outcome.accepted, trial.left - 1
        if trial.left:
            return
        speed = trial.tokens / (trial.steps * memory.seconds(trial.shape, length))
        if trial.shape is not None and not trial.prolonged and speed > memory.rate(memory.current, length):
            # What was seen long ago would take long to outvote.
            memory.calibration.fade(0.25)
            trial.prolonged, trial.left = True, LONGER
            return
        self._trial = None
        waiting = memory.waiting[trial.shape]
        waiting.gap = FIRST_GAP if memory.review(length) else min(2 * waiting.gap, LARGEST_GAP)
        waiting.until = memory.steps + waiting.gap
        self._next_review = memory.steps + USUAL

    def _review(self, length: int) -> None:
        memory = self.memory
        before = memory.current
        if memory.review(length):
            waiting = memory.waiting[before]
            waiting.until = memory.steps + waiting.gap
        elif due := memory.due(length):
            self._trial = _Trial(due[0])
        self._next_review = memory.steps + (EARLY if memory.calibration.steps < EARLY_STEPS else USUAL)
