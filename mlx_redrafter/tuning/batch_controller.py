"""Chooses what the steps of a batch draft: the more texts there are, the fewer drafts each of them gets.

Knows nothing of text. A step of B texts reads B x (1 + N) rows in one call of the model, all
texts equally many. What such a step costs is computed from what steps of one text cost, and
corrected by what steps take; nothing waits for a measurement. The plan with the most expected
tokens per second is in use, and plain decoding is one of them. Now and then the next best plan
is tried for a few steps; where that does not help, it is waited for twice as long.
"""

from __future__ import annotations

import dataclasses
import time
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
from mlx_redrafter.tuning.shape_controller import Slowness
from mlx_redrafter.tuning.step_costs import Costs

MOST_ROWS = 64  # of all texts together, from which on no device reads more of them for little
BETTER = 1.02  # by how much another plan has to be faster to take over
CLOSE = 0.8  # of the speed in use, from which on a plan is worth a trial; beside plain steps the best one always is
BURST, LONGER = 4, 12  # steps of a trial, and steps more if they went better than what is in use
FIRST_GAP, LARGEST_GAP = 32, 512  # steps between two trials
COARSE = 64  # tokens of context that make no difference to a step's time
FEW = 3  # tokens of a lookup where it drafts whether that pays or not


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
        self._trial: Plan | None = None
        self._left = self._unread = 0  # steps of the trial that are to be asked for, and to be read
        self._made = self._read = 0  # tokens of those that were read, and for how many texts
        self._prolonged = False
        self._last: tuple[int, Plan] | None = None
        self._read_at = 0.0

    def follow(self, tokens: list[int]) -> LookupFollower | None:
        return None if self.lookup == OFF else LookupFollower(TextIndex(tokens), self.found)

    def plan(self, texts: int, length: int, follows: Sequence[LookupFollower | None] = ()) -> Plan:
        plan = self._without_lookup(texts, length)
        right = [] if plan == self._trial else [follow.expected() for follow in follows if follow is not None]
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

    def _without_lookup(self, texts: int, length: int) -> Plan:
        fit = [plan for plan in self.plans if plan == PLAIN or texts * (1 + plan.num_draft_tokens) <= MOST_ROWS]
        rates = {plan: self._rate(plan, texts, length) for plan in fit}
        if self._trial is not None and self._trial in rates and self._left > 0:
            self._left -= 1
            return self._trial
        trials = self.trials.setdefault(rounded(texts), Trials())
        best = max(rates, key=lambda plan: rates[plan] * (BETTER if plan == trials.best else 1.0))
        if best != trials.best:
            trials.best, trials.gap, trials.due = best, FIRST_GAP, min(trials.due, trials.steps + FIRST_GAP)
        trials.steps += 1
        if trials.steps < trials.due:
            return best
        others = sorted((plan for plan in fit if plan != best), key=lambda plan: -rates[plan])
        others = [plan for plan in others if rates[plan] > CLOSE * rates[best]] or others[: best == PLAIN]
        if not others:
            return best
        trial = min(others, key=lambda plan: trials.tried.get(plan, -1))
        self._trial, trials.tried[trial], self._prolonged = trial, trials.steps, False
        self._left, self._unread, self._made, self._read = BURST - 1, BURST, 0, 0
        trials.gap = min(2 * trials.gap, LARGEST_GAP)
        trials.due = trials.steps + trials.gap
        return trial

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
        """Of a step, as slow as such steps lately were."""
        return self._seconds(plan, texts, length) * self.slowness.value(rounded(texts), plan)

    def learn(self, steps: list[StepRead], timed: bool = True) -> None:
        now = self.clock()
        if steps:
            texts, plan, length = len(steps), steps[0].plan, max(step.length for step in steps)
            # A step behind one of another kind, or of other texts, has waited for more than itself.
            if timed and self._last == (texts, plan):
                expected = self._seconds(plan, texts, length)
                self.slowness.learn(rounded(texts), plan, (now - self._read_at) / expected)
            self._last = texts, plan
            for step in steps:
                if isinstance(plan, Drafted) and not plan.with_lookup:
                    self.acceptance.learn(step)
                if isinstance(step.follows, LookupFollower):
                    step.follows.index.extend(step.tokens)
                    step.follows.learn(step)
            if plan == self._trial:
                self._made, self._read = self._made + sum(len(step.tokens) for step in steps), self._read + texts
                self._unread -= 1
                if not self._unread:
                    self._end_trial(plan, texts, length)
        self._read_at = now

    def _end_trial(self, plan: Plan, texts: int, length: int) -> None:
        """Ends a trial, or goes on with one that went better than what is in use."""
        seconds = self._step_seconds(plan, texts, length)
        best = self.trials[rounded(texts)].best if rounded(texts) in self.trials else None
        better = best is not None and self._made / self._read / seconds > self._rate(best, texts, length)
        if self._prolonged or plan == PLAIN or not better:
            self._trial = None
            return
        self.acceptance.fade(0.25)  # what was seen long ago would take long to outvote
        self._left = self._unread = LONGER
        self._prolonged = True


def rounded(texts: int) -> int:
    """The number of texts whose slowness stands for that of these: the next power of two."""
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
    kept = session.costs, session.batches, session.trials
    return BatchController(memory.acceptance, plans, *kept, lookup, memory.lookup), session
