"""Chooses what the steps of a batch draft: the more texts there are, the fewer drafts each of them gets.

Knows nothing of text. A step of B texts reads B x (1 + N) rows in one call of the model, all
texts equally many. What such a step costs is measured when so many texts first run together,
and corrected by what steps take from then on; the plan with the most expected tokens per
second is in use, and plain decoding is one of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mlx_redrafter.decoding.planner import BatchPlanner, StepRead
from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, Plan
from mlx_redrafter.target.verification import Verifier
from mlx_redrafter.tuning.acceptance_model import AcceptanceModel
from mlx_redrafter.tuning.measure import measure_batch
from mlx_redrafter.tuning.running import RecentMedian
from mlx_redrafter.tuning.session import Session, session_for

TRIAL = 64  # steps after which a batch that decodes plainly drafts once: texts change
TIMES, TRUSTED = 32, 5  # measured times of a plan that count, and those from which on no others do

Seconds = dict[str, float]


class BatchController(BatchPlanner):
    """The planner of one batch.

    Args:
        acceptance: how often the drafter was right.
        plans: to choose from, besides plain decoding.
        measured: seconds of a step of so many texts together, by the plans that it can have.
        clock: seconds; not the machine's in tests.
    """

    def __init__(
        self,
        acceptance: AcceptanceModel,
        plans: Sequence[Drafted],
        measured: Callable[[int], Seconds],
        clock: Callable[[], float] = time.perf_counter,
    ):
        super().__init__(PLAIN)
        self.acceptance, self.plans, self.measured, self.clock = acceptance, plans, measured, clock
        self._slowness: dict[tuple[int, Plan], RecentMedian] = {}
        self._drift = RecentMedian(2 * TIMES)  # of all plans, which holds for those that were not in use
        self._plain = 0  # steps since something was drafted
        self._last: tuple[int, Plan] | None = None
        self._read_at = 0.0

    def plan(self, texts: int, length: int) -> Plan:
        size = rounded(texts)
        seconds = self.measured(size)
        found: list[Plan] = [plan for plan in self.plans if str(plan) in seconds]
        if not found:
            return PLAIN
        best = max(found, key=lambda plan: self._rate(plan, size))
        self._plain += 1
        if self._plain <= TRIAL and self._rate(PLAIN, size) >= self._rate(best, size):
            return PLAIN
        self._plain = 0
        return best

    def _rate(self, plan: Plan, size: int) -> float:
        """Expected tokens per second of each text."""
        tokens = 1 + self.acceptance.expected(plan.shape) if isinstance(plan, Drafted) else 1.0
        drift, slowness = self._drift.value(1.0, TRUSTED), self._slowness.get((size, plan))
        return tokens / (self.measured(size)[str(plan)] * (slowness.value(drift, TRUSTED) if slowness else drift))

    def learn(self, steps: list[StepRead]) -> None:
        now = self.clock()
        if steps:
            kind = rounded(len(steps)), steps[0].plan
            # A step behind one of another kind, or of other texts, has waited for more than itself.
            if kind == self._last and (table := self.measured(kind[0]).get(str(kind[1]))):
                ratio = (now - self._read_at) / table
                self._slowness.setdefault(kind, RecentMedian(TIMES)).learn(ratio)
                self._drift.learn(ratio)
            self._last = kind
            if isinstance(kind[1], Drafted):
                for step in steps:
                    self.acceptance.learn(step)
        self._read_at = now


def rounded(texts: int) -> int:
    """The number of texts whose costs stand for these: the next power of two."""
    return 1 << (texts - 1).bit_length()


def batch_planner(
    verifier: Verifier, drafter: Drafter | None, shape: DraftShape | None
) -> tuple[BatchPlanner, Session | None]:
    """Who plans for a batch; the session, too, if one was needed, for what it learns to be saved.

    Args:
        verifier: with a capability other than "none".
        drafter: the target's; None drafts nothing.
        shape: the one to keep to; None to choose.
    """
    if drafter is None or shape is not None:
        return BatchPlanner(PLAIN if drafter is None or shape is None else Drafted(shape)), None
    session, pair = session_for(verifier, drafter), drafter
    plans = [arm.plan for arm in session.memory.arms if isinstance(arm.plan, Drafted)]

    def measured(texts: int) -> Seconds:
        known = session.costs.batch
        if texts not in known:
            known[texts] = measure_batch(verifier, pair, texts, [PLAIN, *plans])
            session.keep()
        return known[texts]

    return BatchController(session.memory.acceptance, plans, measured), session
