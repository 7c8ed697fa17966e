"""Names what the costs of a pair depend on: the device, the kind of target and the kind of drafter.

Knows nothing of costs.
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

from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.system.device import blas_threads, device_name, on_cpu
from mlx_redrafter.system.openblas import IDLE_VARIABLE, prefer_openblas
from mlx_redrafter.target.verification import Verifier
from mlx_redrafter.tuning import store

STEPS = 3  # raised where this package makes steps cheaper or dearer: what was measured and learnt before is void


def key_of(verifier: Verifier, drafter: Drafter | None) -> dict[str, Any]:
    """What the costs of a pair depend on, in words that JSON keeps."""
    kind = "none" if drafter is None else f"{type(drafter).__name__} {_kind(drafter)}"
    together = {} if verifier.target.ranks is None else {"ranks": verifier.target.ranks.key()}
    return {**_device_key(), **together, "target": _target_key(verifier), "drafter": kind}


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
        key |= {"blas": prefer_openblas(), "threads": blas_threads(), "idle": idle, "steps": STEPS}
    return key


def _kind(module: nn.Module) -> str:
    """A digest of the names, shapes and types of all weights, and of how they are quantised."""
    weights: list[Any] = tree_flatten(module.parameters())  # type: ignore[assignment]
    facts = [[name, list(array.shape), str(array.dtype)] for name, array in weights]
    scheme = sorted({(m.bits, m.group_size) for m in module.modules() if "scales" in m})
    heads = sorted({int(m.n_heads) for m in module.modules() if isinstance(getattr(m, "n_heads", None), int)})
    return store.digest(json.dumps([facts, scheme, heads]).encode())


def identity(model: nn.Module) -> str:
    """Tells models apart by the names, shapes, types and a few entries of all their weights."""
    return _kind(model) + weights_digest(model)


def weights_digest(module: nn.Module) -> str:
    """Tells modules of one kind apart, by a few entries of each of their tensors."""
    weights: list[Any] = tree_flatten(module.parameters())  # type: ignore[assignment]
    entries = mx.concatenate([array.reshape(-1)[:64].astype(mx.float32) for _, array in weights])
    return store.digest(np.array(entries).tobytes())
