"""What is known of one pair on this device: its costs, what was learnt of its drafter, the shapes to choose from.

Knows nothing of text.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_redrafter.decoding.planner import Planner
from mlx_redrafter.decoding.sampling import Chooser, draft_temperature
from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.drafting.lookup import LookupProposer
from mlx_redrafter.drafting.lookup_index import TextIndex
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.drafting.proposers import Proposer, proposer_for
from mlx_redrafter.drafting.shape import OFF, ON, PLAIN, Drafted, DraftShape, Plan
from mlx_redrafter.system.device import blas_threads, device_name, on_cpu
from mlx_redrafter.system.openblas import IDLE_VARIABLE, prefer_openblas
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import CHAIN, NONE, Verifier
from mlx_redrafter.tuning import store
from mlx_redrafter.tuning.acceptance_model import AcceptanceModel
from mlx_redrafter.tuning.lookup_controller import DEEPEST, LookupController
from mlx_redrafter.tuning.measure import measure
from mlx_redrafter.tuning.shape_controller import Controller, PairMemory
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
        drafter: digest of the drafter's weights; empty without one.
        costs: of a step.
        fresh: whether they were measured just now.
        acceptance: how often the drafter was right.
        shapes: to choose from.

    Attributes:
        memory: what choosing goes by.
    """

    def __init__(
        self,
        verifier: Verifier | None,
        key: dict[str, Any],
        drafter: str,
        costs: Costs,
        fresh: bool,
        acceptance: AcceptanceModel,
        shapes: list[DraftShape],
    ):
        self.verifier, self.key, self.drafter, self.costs, self.fresh = verifier, key, drafter, costs, fresh
        self.memory = PairMemory(costs, acceptance, [PLAIN, *map(Drafted, shapes)])
        self._fixed: dict[DraftShape, PairMemory] = {}
        self._saved = acceptance.steps

    def planner(self, shape: DraftShape | None, lookup: str, index: TextIndex) -> Planner:
        """The planner of one text.

        Args:
            shape: the one to keep to; None to choose.
            lookup: "off", "auto" or "on".
            index: the text so far, which the proposer extends.
        """
        memory = self.memory
        if shape is not None:
            plan: Plan = Drafted(shape) if self.drafter else PLAIN
            if shape not in self._fixed:
                self._fixed[shape] = PairMemory(self.costs, memory.acceptance, [plan])
                self._fixed[shape].lookup = memory.lookup
            memory = self._fixed[shape]
        if lookup == OFF:
            return Controller(memory)
        longest = shape.as_chain().num_draft_tokens if shape and (lookup == ON or not self.drafter) else DEEPEST
        found = LookupController(index, lookup, memory.lookup, memory.seconds, memory.speed, longest)
        return Controller(memory, found)

    def save(self) -> None:
        """Keeps what was learnt of the drafter, if that is much more than was kept."""
        if self.memory.acceptance.steps - self._saved < ENOUGH:
            return
        self._saved = self.memory.acceptance.steps
        fields = store.read(self.key)  # another process may have added its own
        learnt = {name: one for name, one in fields.get("drafters", {}).items() if name != self.drafter}
        learnt = dict(list(learnt.items())[1 - MOST_DRAFTERS :]) | {self.drafter: self.memory.acceptance.to_dict()}
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
    verifier: Verifier, drafter: Drafter | None, shape: DraftShape | None, lookup: str, text: list[int], choose: Chooser
) -> tuple[Proposer, Planner, Session | None]:
    """Who proposes for one text, and who plans.

    Args:
        verifier: with a capability other than "none".
        drafter: the target's; None where lookup alone drafts.
        shape: the one to keep to; None to choose, or with lookup alone.
        lookup: "off", "auto" or "on".
        text: all tokens before the first step.
        choose: how the target chooses.

    Returns:
        the session too, if one was needed, for what it learns to be saved.
    """
    inner = None if drafter is None else proposer_for(drafter, verifier.target.embed, draft_temperature(choose))
    if lookup == OFF and shape is not None and inner is not None:
        return inner, Planner(Drafted(shape)), None
    index, session = TextIndex([] if lookup == OFF else text), session_for(verifier, drafter)
    proposer = inner if inner is not None and lookup == OFF else LookupProposer(inner, index)
    return proposer, session.planner(shape, lookup, index), session


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
    key = key_of(verifier, drafter)
    fields, name = {} if fresh else store.read(key), json.dumps(key, sort_keys=True)
    weights, measured = "" if drafter is None else weights_digest(drafter), False
    assumed = [] if drafter is None or fresh else list(drafter.config.right_by_depth)
    acceptance = AcceptanceModel(assumed)
    try:
        costs = Costs.from_dict(fields["costs"])
        if (learnt := fields["drafters"].get(weights)) is not None:
            acceptance.restore(learnt)
    except (ValueError, TypeError, KeyError, AttributeError):
        measured = fresh or name not in _measured
        costs, acceptance = measure(verifier, drafter) if measured else _measured[name], AcceptanceModel(assumed)
        store.write(key, {"costs": costs.to_dict(), "drafters": {}})
    _measured[name] = costs
    shapes = [] if drafter is None else [shape for shape in SHAPES if _fits(shape, verifier, drafter)]
    # A model that had its own verifier would own itself in a circle, and its memory would stay.
    session = Session(None if drafter is None else verifier, key, weights, costs, measured, acceptance, shapes)
    owner._redrafter_session = session
    return session


def _fits(shape: DraftShape, verifier: Verifier, drafter: Drafter) -> bool:
    width = 1 if verifier.capability == CHAIN else drafter.config.scored
    return shape.beam_width <= width and shape.beam_length <= 1 + drafter.deepest


def key_of(verifier: Verifier, drafter: Drafter | None) -> dict[str, Any]:
    """What the costs of a pair depend on, in words that JSON keeps."""
    kind = "none" if drafter is None else f"{type(drafter).__name__} {_kind(drafter)}"
    return {**_device_key(), "target": _target_key(verifier), "drafter": kind}


def _target_key(verifier: Verifier) -> str:
    model = verifier.target.model
    return f"{getattr(model, 'model_type', type(model).__name__)} {_kind(model)} {verifier.capability}"


@functools.lru_cache(maxsize=1)
def _device_key() -> dict[str, Any]:
    key: dict[str, Any] = {
        "device": device_name(),
        "mlx": importlib.metadata.version("mlx"),
        "mlx_lm": importlib.metadata.version("mlx-lm"),
        "python": platform.python_version(),
    }
    if on_cpu():
        # Threads that spin between products slow down everything else: other costs altogether.
        idle = os.environ.get(IDLE_VARIABLE)
        key |= {"blas": prefer_openblas(), "threads": blas_threads(), "idle": idle}
    return key


def _kind(module: nn.Module) -> str:
    """A digest of the names, shapes and types of all weights, and of how they are quantised."""
    weights: list[Any] = tree_flatten(module.parameters())  # type: ignore[assignment]
    facts = [[name, list(array.shape), str(array.dtype)] for name, array in weights]
    scheme = sorted({(m.bits, m.group_size) for m in module.modules() if "scales" in m})
    heads = sorted({int(m.n_heads) for m in module.modules() if isinstance(getattr(m, "n_heads", None), int)})
    return store.digest(json.dumps([facts, scheme, heads]).encode())


def weights_digest(drafter: Drafter) -> str:
    """Tells drafters of one kind apart, by a few entries of each of their tensors."""
    weights: list[Any] = tree_flatten(drafter.parameters())  # type: ignore[assignment]
    entries = mx.concatenate([array.reshape(-1)[:64].astype(mx.float32) for _, array in weights])
    return store.digest(np.array(entries).tobytes())
