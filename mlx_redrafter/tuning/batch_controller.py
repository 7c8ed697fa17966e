"""Chooses what the steps of a batch draft: the more texts there are, the fewer drafts each of them gets.

Knows nothing of text. A step of B texts reads B x (1 + N) rows in one call of the model, all
texts equally many. What such a step costs is computed from what steps of one text cost, and
corrected by what steps take; nothing waits for a measurement. The plan with the most expected
tokens per second is in use, and plain decoding is one of them. Now and then the next best plan
is tried for a few steps, each time after twice as many.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

from mlx_redrafter.decoding.planner import BatchPlanner, StepRead
from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.drafting.lookup import TextIndex
from mlx_redrafter.drafting.shape import OFF, ON, PLAIN, Drafted, DraftShape, LookedUp, Plan
from mlx_redrafter.target.verification import Verifier
from mlx_redrafter.tuning.acceptance_model import AcceptanceModel
from mlx_redrafter.tuning.lookup_controller import BETTER as LOOKUP_BETTER
from mlx_redrafter.tuning.lookup_controller import COUNTS, DEEPEST, LookupFollower, LookupMemory
from mlx_redrafter.tuning.session import Session, session_for
from mlx_redrafter.tuning.shape_controller import RecentMedian
from mlx_redrafter.tuning.step_costs import Costs

MOST_ROWS = 64  # of all texts together, from which on no device reads more of them for little
BETTER = 1.02  # by how much another plan has to be faster to take over
UPKEEP = 1.1  # by how much steps with drafts have to be faster than plain ones: a drafter reads prompts and joins, too
CLOSE = 0.8  # of the speed in use, from which on a plan is worth a trial; beside plain steps the best one always is
BURST = 4  # steps of a trial
COMPARED, TIMES = 8, 9  # steps after another plan that say how the two compare; comparisons that count
FEWEST, RECENT = 3, 9  # steps that say how slow the machine is
OWN = 0.25  # of what makes a plan slow (as a power) that is taken to be its own before it was compared
FIRST_GAP, LARGEST_GAP = 32, 512  # steps between two trials
COARSE = 64  # tokens of context that make no difference to a step's time
FEW = 3  # tokens of a lookup where it drafts whether that pays or not


class Slowness:
    """How much slower than computed a plan's steps are beside those of plain decoding.

    A machine is slow for a while, whatever it is at, and so are steps of so many texts. So of a plan counts how its
    steps compare with those of as many texts right before, which another plan had. Plain steps are what all are
    compared with in the end.
    """

    def __init__(self) -> None:
        # By the number of texts, see `rounded`, and by plan; a comparison counts once, however many steps it took.
        self._compared: dict[tuple[int, Plan], RecentMedian] = defaultdict(lambda: RecentMedian(TIMES))
        self._alone: dict[tuple[int, Plan], RecentMedian] = defaultdict(lambda: RecentMedian(TIMES))
        self._texts = 0
        self._plan: Plan | None = None
        self._recent: deque[float] = deque(maxlen=RECENT)  # how slow the last steps of this plan were
        self._before: float | None = None  # plain ones before it; None if they are not to be compared with
        self._beside: list[float] = []  # and its own beside them

    def learn(self, texts: int, plan: Plan, ratio: float, between: bool = False) -> None:
        """Takes a step's measured over its computed seconds; `between` are steps with lookups, which come and go."""
        key = rounded(texts), plan
        if between:
            if texts == self._texts and (usual := self._usual()) is not None:
                self._compared[key].learn(ratio / usual)
            return
        if (texts, plan) != (self._texts, self._plan):
            self._note()
            self._before = self._usual() if texts == self._texts else None
            self._texts, self._plan = texts, plan
            self._recent.clear()
        if self._before is None:
            self._alone[key].learn(ratio)
        else:
            self._beside.append(ratio / self._before)
            if len(self._beside) == COMPARED:
                self._note()
        self._recent.append(ratio)

    def _note(self) -> None:
        """Ends a comparison."""
        if self._beside and self._plan is not None and self._plan != PLAIN:
            self._compared[rounded(self._texts), self._plan].learn(statistics.median(self._beside))
        self._beside, self._before = [], None

    def _usual(self) -> float | None:
        """How slow plain steps would have been lately; None if too few steps say so."""
        if len(self._recent) < FEWEST or self._plan is None:
            return None
        own = self._compared.get((rounded(self._texts), self._plan))
        return statistics.median(self._recent) / (1.0 if own is None else own.value(1.0, 1))

    def value(self, texts: int, plan: Plan) -> float:
        key = rounded(texts), plan
        if key in self._compared:
            return self._compared[key].value(1.0, 1)
        # Some of what makes it slower than computed is its own.
        return self._alone[key].value(1.0, 1) ** OWN if key in self._alone and plan != PLAIN else 1.0


@dataclasses.dataclass
class Trials:
    """When plans are tried that are not in use, for one number of texts.

    Attributes:
        best: the plan in use.
        steps: so far.
        due, gap: the step of the next trial, and steps from there to the one after.
        tried: the step at which each plan was tried last.
    """

    best: Plan | None = None
    steps: int = 0
    due: int = FIRST_GAP
    gap: int = FIRST_GAP
    tried: dict[Plan, int] = dataclasses.field(default_factory=dict)


class BatchController(BatchPlanner):
    """The planner of one batch.

    Args:
        acceptance: how often the drafter was right.
        plans: to choose from, besides plain decoding.
        costs: of the steps of one text.
        slowness: of steps of several, by how many texts and by plan; outlives batches.
        trials: by how many texts; outlives batches.
        lookup: "off", "auto", or "on" to look up wherever something is found.
        found: how often lookups were right.
        clock: seconds; not the machine's in tests.
    """

    def __init__(
        self,
        acceptance: AcceptanceModel,
        plans: Sequence[Drafted],
        costs: Costs,
        slowness: Slowness,
        trials: dict[int, Trials],
        lookup: str = OFF,
        found: LookupMemory | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        super().__init__(PLAIN)
        self.acceptance, self.clock = acceptance, clock
        self.lookup, self.found = lookup, found or LookupMemory()
        self.plans: list[Plan] = [PLAIN, *plans]
        self.costs, self.slowness, self.trials = costs, slowness, trials
        self._table: dict[tuple[int, Plan, int], float] = {}
        self._trial: Plan = PLAIN
        self._left = 0  # steps more that try it
        self._last: tuple[int, Plan] | None = None
        self._read_at = 0.0

    def follow(self, tokens: list[int]) -> LookupFollower | None:
        return None if self.lookup == OFF else LookupFollower(TextIndex(tokens), self.found)

    def plan(self, texts: int, length: int, follows: Sequence[LookupFollower | None] = ()) -> Plan:
        plan, is_trial = self._without_lookup(texts, length)
        right = [] if is_trial else [follow.expected() for follow in follows if follow is not None]
        return self._with_lookup(plan, length, right) if any(found[1] for found in right) else plan

    def _with_lookup(self, plan: Plan, length: int, right: list[list[float]]) -> Plan:
        """The plan, with lookup in it or in its place where that should bring more tokens per second.

        Args:
            right: of each text, right tokens to expect of a lookup of 0, 1, 2, ... tokens; none where it finds nothing.
        """
        texts, best, most = len(right), plan, LOOKUP_BETTER * self._rate(plan, len(right), length)

        def offer(other: Plan, tokens: float) -> None:
            nonlocal best, most
            if (rate := tokens / texts / self._step_seconds(other, texts, length)) > most:
                best, most = other, rate

        if isinstance(plan, Drafted):
            expected = self.acceptance.expected(plan.shape)
            depth = min(plan.shape.beam_length - 1, plan.num_draft_tokens, DEEPEST)
            if plan.shape.beam_width == 1:  # a chain makes way, in a tree both have a place
                each = [found[depth] if found[1] else expected for found in right]
            else:
                each = [max(expected, found[depth]) for found in right]
            both = Drafted(plan.shape, with_lookup=True)
            if self.lookup == ON:
                return both
            offer(both, texts + sum(each))
        for count in COUNTS:
            if texts * (1 + count) <= MOST_ROWS:
                offer(LookedUp(count), texts + sum(found[count] for found in right))
        if self.lookup == ON and best == plan:
            return LookedUp(min(FEW, max(1, MOST_ROWS // texts - 1)))
        return best

    def _without_lookup(self, texts: int, length: int) -> tuple[Plan, bool]:
        """The plan, and whether it is only tried."""
        fit = [plan for plan in self.plans if plan == PLAIN or texts * (1 + plan.num_draft_tokens) <= MOST_ROWS]
        rates = {plan: self._rate(plan, texts, length) for plan in fit}
        if self._left > 0 and self._trial in rates:
            self._left -= 1
            return self._trial, True
        trials = self.trials.setdefault(rounded(texts), Trials())
        rates[PLAIN] *= UPKEEP
        best = max(rates, key=lambda plan: rates[plan] * (BETTER if plan == trials.best else 1.0))
        if best != trials.best:
            trials.best, trials.gap, trials.due = best, FIRST_GAP, min(trials.due, trials.steps + FIRST_GAP)
        trials.steps += 1
        if trials.steps < trials.due:
            return best, False
        others = sorted((plan for plan in fit if plan != best), key=lambda plan: -rates[plan])
        others = [plan for plan in others if rates[plan] > CLOSE * rates[best]] or others[: best == PLAIN]
        if not others:
            return best, False
        trial = min(others, key=lambda plan: trials.tried.get(plan, -1))
        self._trial, self._left, trials.tried[trial] = trial, BURST - 1, trials.steps
        trials.gap = min(2 * trials.gap, LARGEST_GAP)
        trials.due = trials.steps + trials.gap
        return trial, True

    def _seconds(self, plan: Plan, texts: int, length: int) -> float:
        key = texts, plan, length // COARSE
        if key not in self._table:
            self._table[key] = self.costs.batch_seconds(plan, texts, length)
        return self._table[key]

    def _rate(self, plan: Plan, texts: int, length: int) -> float:
        """Expected tokens per second of each text."""
        tokens = 1 + self.acceptance.expected(plan.shape) if isinstance(plan, Drafted) else 1.0
        return tokens / self._step_seconds(plan, texts, length)

    def _step_seconds(self, plan: Plan, texts: int, length: int) -> float:
        """Of a step, as slow as such steps were beside plain ones."""
        return self._seconds(plan, texts, length) * self.slowness.value(texts, plan)

    def learn(self, steps: list[StepRead], timed: bool = True) -> None:
        now = self.clock()
        if steps:
            texts, plan, length = len(steps), steps[0].plan, max(step.length for step in steps)
            # A step behind one of another kind, or of other texts, has waited for more than itself.
            if timed and self._last == (texts, plan):
                expected = self._seconds(plan, texts, length)
                self.slowness.learn(texts, plan, (now - self._read_at) / expected, plan not in self.plans)
            self._last = texts, plan
            for step in steps:
                if isinstance(plan, Drafted) and not plan.with_lookup:
                    self.acceptance.learn(step)
                if isinstance(step.follows, LookupFollower):
                    step.follows.index.extend(step.tokens)
                    step.follows.learn(step)
        self._read_at = now


def rounded(texts: int) -> int:
    """The number of texts under which what is known of these is kept: the next power of two."""
    return 1 << (texts - 1).bit_length()


def batch_planner(
    verifier: Verifier, drafter: Drafter | None, shape: DraftShape | None, lookup: str = OFF
) -> tuple[BatchPlanner, Session | None]:
    """Who plans for a batch; the session, too, if one was needed, for what it learns to be saved.

    Args:
        verifier: with a capability other than "none".
        drafter: the target's; None drafts nothing, but for what lookup finds.
        shape: the one to keep to, with what lookup finds in every step if it is not off; None to choose.
        lookup: "off", "auto" or "on".
    """
    if drafter is None and lookup == OFF:
        return BatchPlanner(PLAIN), None
    if drafter is not None and shape is not None:
        return BatchPlanner(Drafted(shape, with_lookup=lookup != OFF)), None
    session = session_for(verifier, drafter)
    plans = [arm.plan for arm in session.memory.arms if isinstance(arm.plan, Drafted)]
    memory = session.memory
    if session.of_batches is None:
        session.of_batches = Slowness(), dict[int, Trials]()
    slowness, trials = session.of_batches
    known = memory.acceptance, plans, session.costs, slowness, trials
    return BatchController(*known, lookup, memory.lookup), session
