"""Which shapes are worth drafting on this device, from measured costs and what a drafter gets right.

Expected tokens per second of a shape are 1 + the draft tokens it should get accepted, over
the time of its step. The tree's policy needs no search: no choice of N nodes can be
expected to get more accepted than the N most probable ones, which is `best-first`.
"""

from __future__ import annotations

import dataclasses
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

from mlx_redrafter.drafting.kinds import Drafter, deepest
from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.system.device import blas_threads, device_name, on_cpu
from mlx_redrafter.system.openblas import IDLE_VARIABLE, prefer_openblas
from mlx_redrafter.target.verification import CHAIN, Verifier
from mlx_redrafter.tuning import store
from mlx_redrafter.tuning.calibration import DEPTHS, FIRST, Calibration, later_assumed
from mlx_redrafter.tuning.expectation import Expectation
from mlx_redrafter.tuning.shape_controller import Adaptation, Memory
from mlx_redrafter.tuning.step_costs import SHORT, Costs, measure
from mlx_redrafter.tuning.store import Kept

WIDTHS = (1, 2, 3, 4, 6, 8)
LONGEST = 9  # tokens per beam, the root included
NODES = (1, 2, 3, 4, 5, 6, 7, 8, 11, 15, 23, 31)
# Shares of right first choices for which a best shape is kept at hand: from a drafter that
# is hardly ever right to one that nearly always is.
QUALITIES = (0.2, 0.35, 0.5, FIRST, 0.8, 0.9)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a pair can do at all: beams, and tokens per beam, the root included."""

    width: int = max(WIDTHS)
    length: int = LONGEST

    @classmethod
    def of(cls, verifier: Verifier, drafter: Drafter) -> Limits:
        width = 1 if verifier.capability == CHAIN else min(max(WIDTHS), drafter.config.scored)
        return cls(width, min(LONGEST, 1 + deepest(drafter)))


def all_shapes(limits: Limits) -> list[DraftShape]:
    """Every shape that comes into question; the deepest node of a tree can be reached."""
    return [
        DraftShape(width, length, nodes)
        for width in WIDTHS
        if width <= limits.width
        for length in range(2, limits.length + 1)
        for nodes in NODES
        if (nodes == length - 1 if width == 1 else length - 1 < nodes <= width * (length - 1))
    ]


def best_shape(
    costs: Costs, first: list[float], later: list[float], limits: Limits = Limits(), context: int = SHORT
) -> tuple[DraftShape, float]:
    """The shape with the largest expected speed, and that speed in tokens per second.

    Args:
        first, later: the drafter's shares (see `Expectation`).
        limits: of the pair.
        context: tokens before the step.
    """
    expectation = Expectation(first, later)

    def speed(shape: DraftShape) -> float:
        return (1 + expectation.accepted(shape)) / costs.step_seconds(shape, context)

    best = max(all_shapes(limits), key=lambda shape: (speed(shape), -shape.num_draft_tokens))
    return best, speed(best)


def few_shapes(costs: Costs, calibration: Calibration, limits: Limits = Limits()) -> list[DraftShape]:
    """The shapes to change between while decoding: the best for what is known, and for drafters of any quality."""
    shares = [(calibration.first(), calibration.later())]
    shares += [([quality] * DEPTHS, later_assumed(quality)) for quality in QUALITIES]
    found = [best_shape(costs, first, later, limits)[0] for first, later in shares]
    return list(dict.fromkeys(found))


@dataclasses.dataclass
class Tuning:
    """What is known of a pair on this device.

    Attributes:
        kept: the costs, and what else the file of this kind of pair holds.
        drafter: digest of the drafter's weights.
        memory: what choosing goes by.
        fresh: whether the costs were measured just now.
    """

    kept: Kept
    drafter: str
    memory: Memory
    fresh: bool
    _saved: int = 0

    def adaptation(self) -> Adaptation:
        """Steers one text."""
        return Adaptation(self.memory)

    def save(self, least: int = 32) -> None:
        """Keeps what was learnt of the drafter, if that is at least so many drafted steps more."""
        calibration = self.memory.calibration
        if calibration.steps - self._saved < least:
            return
        self._saved = calibration.steps
        kept = store.read(self.kept.key) or self.kept  # another process may have added its own
        kept.calibrations.pop(self.drafter, None)
        kept.calibrations[self.drafter] = calibration
        store.write(kept)


_measured: dict[str, Costs] = {}  # in this process, by key


def tuning_for(verifier: Verifier, drafter: Drafter, fresh: bool = False) -> Tuning:
    """What is known of a pair; measured if it was not before, which takes about two seconds.

    Args:
        verifier: with a capability other than "none".
        drafter: the target's.
        fresh: measure anew whatever is kept, and assume nothing of the drafter.
    """
    key = key_of(verifier, drafter)
    name = json.dumps(key, sort_keys=True)
    known: Tuning | None = getattr(drafter, "_redrafter_tuning", None)
    if known is not None and known.kept.key == key and not fresh:
        return known
    kept = None if fresh else store.read(key)
    measure_now = kept is None and (fresh or name not in _measured)
    if kept is None:
        kept = Kept(key, measure(verifier, drafter) if measure_now else _measured[name], {})
        store.write(kept)
    _measured[name] = kept.costs
    weights = weights_digest(drafter)
    calibration = kept.calibrations.get(weights) or Calibration()
    shapes = few_shapes(kept.costs, calibration, Limits.of(verifier, drafter))
    tuning = Tuning(kept, weights, Memory(kept.costs, calibration, shapes), measure_now, calibration.steps)
    # An attribute that is neither array nor module is no parameter of an nn.Module.
    drafter._redrafter_tuning = tuning
    return tuning


def key_of(verifier: Verifier, drafter: Drafter) -> dict[str, Any]:
    """What the costs of a pair depend on, in words that JSON keeps."""
    model = verifier.target.model
    return {
        **_device_key(),
        "target": f"{getattr(model, 'model_type', type(model).__name__)} {_kind(model)} {verifier.capability}",
        "drafter": f"{type(drafter).__name__} {_kind(drafter)}",
    }


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
