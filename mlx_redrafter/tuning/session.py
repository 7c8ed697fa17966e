"""Holds what is known of one pair on this device, and sets up who proposes and who plans for a text.

Knows nothing of how a text is decoded.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import mlx.nn as nn

from mlx_redrafter.decoding.planner import Planner
from mlx_redrafter.decoding.sampling import Chooser, draft_temperature
from mlx_redrafter.drafting.kinds import Drafter, proposer_for
from mlx_redrafter.drafting.lookup import LookupProposer, TextIndex
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.drafting.proposers import Proposer
from mlx_redrafter.drafting.shape import OFF, ON, PLAIN, Drafted, DraftShape, Plan
from mlx_redrafter.system.ranks import Ranks
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import CHAIN, NONE, Verifier
from mlx_redrafter.tuning import store
from mlx_redrafter.tuning.acceptance_model import DEEPEST, AcceptanceModel
from mlx_redrafter.tuning.measure import measure
from mlx_redrafter.tuning.pair_key import key_of, weights_digest
from mlx_redrafter.tuning.pair_memory import PairMemory
from mlx_redrafter.tuning.shape_controller import Controller, LookupController
from mlx_redrafter.tuning.step_costs import Costs

# Few shapes that serve drafters of any quality on devices of any kind: chains, and trees from
# those that a row costs little more than none to those for which rows are free.
SHAPES = (
    *(DraftShape(1, n + 1, n) for n in (1, 2, 3, 4, 5, 7)),
    DraftShape(2, 4, 4),
    DraftShape(2, 5, 7),
    DraftShape(4, 5, 7),
    DraftShape(4, 5, 12),
    DraftShape(4, 6, 16),
    DraftShape(8, 6, 24),
)
MOST_DRAFTERS = 16  # of one kind, of which what was learnt is kept
ENOUGH = 32  # drafted steps more, from which on it is kept again


class Session:
    """A pair on this device.

    Args:
        verifier: the pair's; None without a drafter.
        key: what costs depend on.
        drafter_digest: of the drafter's weights; empty without one.
        costs: of a step.
        measured_now: whether they were measured just now.
        acceptance: how often the drafter was right.
        shapes: to choose from.

    Attributes:
        memory: what choosing goes by.
        of_batches: what steps of several texts taught (see `batch_controller`).
    """

    def __init__(
        self,
        verifier: Verifier | None,
        key: dict[str, Any],
        drafter_digest: str,
        costs: Costs,
        measured_now: bool,
        acceptance: AcceptanceModel,
        shapes: list[DraftShape],
    ):
        self.verifier, self.key, self.drafter_digest = verifier, key, drafter_digest
        self.costs, self.measured_now = costs, measured_now
        self.memory = PairMemory(costs, acceptance, [PLAIN, *map(Drafted, shapes)])
        self.of_batches: dict[int, Any] = {}
        self._structured: PairMemory | None = None
        self._fixed: dict[tuple[DraftShape, bool], PairMemory] = {}
        self._saved = acceptance.steps

    def planner(self, shape: DraftShape | None, lookup: str, index: TextIndex, structured: bool = False) -> Planner:
        """The planner of one text.

        Args:
            shape: the one to keep to; None to choose.
            lookup: "off", "auto" or "on".
            index: the text so far, which the proposer extends.
            structured: its trees are pruned and its steps make masks; free texts learn nothing of that.
        """
        memory = self.memory
        if structured:
            memory = self._structured = self._structured or copy.deepcopy(memory)
            memory.structured = True
        if shape is not None:
            plan: Plan = Drafted(shape) if self.drafter_digest else PLAIN
            if (shape, structured) not in self._fixed:
                fixed = self._fixed[shape, structured] = PairMemory(self.costs, memory.acceptance, [plan])
                fixed.lookup, fixed.structured = memory.lookup, structured
            memory = self._fixed[shape, structured]
        if lookup == OFF:
            return Controller(memory)
        longest = shape.as_chain().num_draft_tokens if shape and (lookup == ON or not self.drafter_digest) else DEEPEST
        found = LookupController(index, lookup, memory.lookup, memory.lookup_seconds, longest)
        return Controller(memory, found)

    def save(self) -> None:
        """Keeps what was learnt of the drafter, if that is much more than was kept."""
        if self.memory.acceptance.steps - self._saved < ENOUGH:
            return
        self._saved = self.memory.acceptance.steps
        self.keep()

    def keep(self) -> None:
        """Keeps costs, and what was learnt of the drafter."""
        fields = store.read(self.key)  # another process may have added its own
        learnt = {name: one for name, one in fields.get("drafters", {}).items() if name != self.drafter_digest}
        learnt = dict(list(learnt.items())[1 - MOST_DRAFTERS :]) | {
            self.drafter_digest: self.memory.acceptance.to_dict()
        }
        store.write(self.key, {"costs": self.costs.to_dict(), "drafters": learnt})


def verifier_for(model: nn.Module, drafter: Drafter | None) -> Verifier:
    """The model's verifier, checked to go with the drafter; once per pair.

    Raises:
        UserError: the drafter was made for another model.
    """
    known: Session | None = getattr(drafter, "_redrafter_session", None)
    if known is not None and known.verifier is not None and known.verifier.target is Target.of(model):
        return known.verifier
    verifier = verifier_of(model)
    if drafter is not None and verifier.capability != NONE:
        check_pair(verifier.target, drafter)
    return verifier


def drafting_for(
    verifier: Verifier,
    drafter: Drafter | None,
    shape: DraftShape | None,
    lookup: str,
    text: list[int],
    choose: Chooser,
    structured: bool = False,
) -> tuple[Proposer, Planner, Session | None]:
    """Who proposes for one text, and who plans.

    Args:
        verifier: with a capability other than "none".
        drafter: the target's; None where lookup alone drafts, or nobody.
        shape: the one to keep to; None to choose, or with lookup alone.
        lookup: "off", "auto" or "on".
        text: all tokens before the first step.
        choose: how the target chooses.
        structured: what is drafted has to be what a grammar allows.

    Returns:
        the session too, if one was needed, for what it learns to be saved.
    """
    inner = proposer_for(drafter, verifier.target.embed, draft_temperature(choose), text)
    if lookup == OFF and shape is not None:
        return inner, Planner(PLAIN if drafter is None else Drafted(shape)), None
    index, session = TextIndex([] if lookup == OFF else text), session_for(verifier, drafter)
    proposer = inner if lookup == OFF else LookupProposer(inner, index)
    return proposer, session.planner(shape, lookup, index, structured), session


_measured: dict[str, Costs] = {}  # in this process, by key


def session_for(verifier: Verifier, drafter: Drafter | None, fresh: bool = False) -> Session:
    """What is known of a pair; measured if it was not before, which takes about two seconds.

    Args:
        verifier: with a capability other than "none".
        drafter: the target's; None where lookup alone drafts.
        fresh: measure anew whatever is kept, and assume nothing of the drafter.
    """
    # An attribute that is neither array nor module is no parameter of an nn.Module.
    owner: Any = verifier.target.model if drafter is None else drafter
    known: Session | None = getattr(owner, "_redrafter_session", None)
    if known is not None and (known.verifier is None or known.verifier.target is verifier.target) and not fresh:
        return known
    key, digest = key_of(verifier, drafter), "" if drafter is None else weights_digest(drafter)
    acceptance = AcceptanceModel([] if drafter is None or fresh else list(drafter.config.right_by_depth))
    costs, measured_now = None if fresh else _kept(key, digest, acceptance, verifier.target.ranks), False
    if costs is None:
        costs = None if fresh else _measured.get(json.dumps(key, sort_keys=True))
        measured_now = costs is None
        costs = costs or measure(verifier, drafter)
        store.write(key, {"costs": costs.to_dict(), "drafters": {}})
    _measured[json.dumps(key, sort_keys=True)] = costs
    shapes = [] if drafter is None else [shape for shape in SHAPES if _fits(shape, verifier, drafter)]
    # A model that had its own verifier would own itself in a circle, and its memory would stay.
    kept = None if drafter is None else verifier
    session = Session(kept, key, digest, costs, measured_now, acceptance, shapes)
    owner._redrafter_session = session
    return session


def _kept(key: dict[str, Any], digest: str, acceptance: AcceptanceModel, ranks: Ranks | None) -> Costs | None:
    """The costs that were kept under a key, if they can be used; `acceptance` gets what was learnt of the drafter."""
    fields = store.read(key)
    if ranks is not None:
        fields = ranks.share(fields)
    try:
        costs = Costs.from_dict(fields["costs"])
        if (learnt := fields["drafters"].get(digest)) is not None:
            acceptance.restore(learnt)
        return costs
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _fits(shape: DraftShape, verifier: Verifier, drafter: Drafter) -> bool:
    width = 1 if verifier.capability == CHAIN else drafter.widest
    return shape.beam_width <= width and shape.beam_length <= 1 + drafter.deepest
