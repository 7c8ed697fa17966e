"""Chooses what the steps of a batch draft: the more texts there are, the fewer drafts each of them gets.

Knows nothing of text. A step of B texts reads B x (1 + N) rows in one call of the model, all
texts equally many. What such a step costs is computed from what steps of one text cost, and
corrected by what steps take; nothing waits for a measurement. The plan with the most expected
tokens per second is in use, and plain decoding is one of them. Now and then the next best plan
is tried for a few steps, each time after twice as many.
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
from mlx_redrafter.tuning.acceptance_model import DEEPEST, AcceptanceModel, LookupFollower, LookupMemory
from mlx_redrafter.tuning.pair_memory import COARSE, FIRST_GAP, Slowness, kind_of
from mlx_redrafter.tuning.session import Session, session_for
from mlx_redrafter.tuning.shape_controller import COUNTS, LOOKUP_BETTER
from mlx_redrafter.tuning.step_costs import Costs

MOST_ROWS = 64  # of all texts together, from which on no device reads more of them for little
BETTER = 1.02  # by how much another plan has to be faster to take over
UPKEEP = 1.1  # by how much steps with drafts have to be faster than plain ones: a drafter reads prompts and joins, too
CLOSE = 0.8  # of the speed in use, from which on a plan is worth a trial; beside plain steps the best one always is
BURST = 4  # steps of a trial
OWN = 0.5  # how far (standard deviation of the logarithm) a plan's steps may be from as slow as others'
LARGEST_GAP = 512  # steps between two trials
FEW = 3  # tokens of a lookup where it drafts whether that pays or not


@dataclasses.dataclass
class BatchMemory:
    """What is known of batches of about so many texts; outlives them.

    Attributes:
        slowness: of each plan's steps.
        best: the plan in use.
        steps: so far.
        due, gap: the step of the next trial, and steps from there to the one after.
        tried: the step at which each plan was tried last.
    """

    slowness: Slowness = dataclasses.field(default_factory=Slowness)
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
        memories: by how many texts, see `rounded`; they outlive batches.
        lookup: "off", "auto", or "on" to look up wherever something is found.
        found: how often lookups were right.
        clock: seconds; not the machine's in tests.
    """

    def __init__(
        self,
        acceptance: AcceptanceModel,
        plans: Sequence[Drafted],
        costs: Costs,
        memories: dict[int, BatchMemory],
        lookup: str = OFF,
        found: LookupMemory | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        super().__init__(PLAIN)
        self.acceptance, self.clock = acceptance, clock
        self.lookup, self.found = lookup, found or LookupMemory()
        self.plans: list[Plan] = [PLAIN, *plans]
        self.costs, self.memories = costs, memories
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
        memory = self.of_size(texts)
        rates[PLAIN] *= UPKEEP
        best = max(rates, key=lambda plan: rates[plan] * (BETTER if plan == memory.best else 1.0))
        if best != memory.best:
            memory.best, memory.gap, memory.due = best, FIRST_GAP, min(memory.due, memory.steps + FIRST_GAP)
        memory.steps += 1
        if memory.steps < memory.due:
            return best, False
        others = sorted((plan for plan in fit if plan != best), key=lambda plan: -rates[plan])
        others = [plan for plan in others if rates[plan] > CLOSE * rates[best]] or others[: best == PLAIN]
        if not others:
            return best, False
        trial = min(others, key=lambda plan: memory.tried.get(plan, -1))
        self._trial, self._left, memory.tried[trial] = trial, BURST - 1, memory.steps
        memory.gap = min(2 * memory.gap, LARGEST_GAP)
        memory.due = memory.steps + memory.gap
        return trial, True

    def of_size(self, texts: int) -> BatchMemory:
        if (memory := self.memories.get(rounded(texts))) is None:
            memory = self.memories[rounded(texts)] = BatchMemory()
        return memory

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
        """Of a step: as computed, times what is the plan's own since then."""
        return self._seconds(plan, texts, length) * self.of_size(texts).slowness.of(kind_of(plan))

    def learn(self, steps: list[StepRead], timed: bool = True) -> None:
        now = self.clock()
        if steps:
            texts, plan, length = len(steps), steps[0].plan, max(step.length for step in steps)
            slowness = self.of_size(texts).slowness
            if self._last is None or self._last[0] != texts:  # what is computed is wrong for all plans alike
                slowness.pause()
            # A step behind one of another kind, or of other texts, has waited for more than itself.
            expected = self._seconds(plan, texts, length)
            if timed and self._last == (texts, plan) and now - self._read_at > 0 < expected:
                slowness.learn(kind_of(plan), (now - self._read_at) / expected, OWN)
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
    planner = BatchController(memory.acceptance, plans, session.costs, session.of_batches, lookup, memory.lookup)
    return planner, session
