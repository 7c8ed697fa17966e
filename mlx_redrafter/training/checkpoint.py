"""Writes and reads checkpoints: weights, optimiser and counters in one file, whole or not at all.

Knows nothing of drafters.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import read_safetensors, replace_file


@dataclasses.dataclass
class Progress:
    """Where a run stands. Rows and positions follow from `done` and the seed; there is no other random state."""

    done: int = 0  # updates made
    best: float | None = None  # of the evaluations so far
    best_at: int = 0  # updates after which it was measured
    since_best: int = 0  # evaluations since then

    def note(self, value: float) -> bool:
        """Takes in an evaluation; whether it is the best."""
        if self.best is not None and value <= self.best:
            self.since_best += 1
            return False
        self.best, self.best_at, self.since_best = value, self.done, 0
        return True

    def is_over(self, patience: int) -> bool:
        return 0 < patience <= self.since_best


def save(path: pathlib.Path, weights: Any, optimizer_state: Any, progress: Progress) -> None:
    """Writes a checkpoint. Raises UserError if the place cannot be written; the one before it then stays."""
    arrays: dict[str, Any] = dict(tree_flatten({"drafter": weights, "optimizer": optimizer_state}))
    with replace_file(path) as file:
        mx.save_safetensors(str(file), arrays, metadata={"progress": json.dumps(dataclasses.asdict(progress))})


def restore(path: pathlib.Path, like: Any) -> tuple[Any, Any, Progress]:
    """Reads weights, optimiser state and progress that `save` wrote.

    Raises:
        UserError: a damaged file, or weights of other names and shapes than those of `like`.
    """
    arrays = read_safetensors(path)
    metadata: Any = mx.load(str(path), return_metadata=True)[1]  # type: ignore[index]
    for name, expected in dict(tree_flatten(like)).items():
        shape: Any = expected.shape  # type: ignore[union-attr]
        found = arrays.get(f"drafter.{name}")
        if found is None or found.shape != shape:
            what = "is missing" if found is None else f"has shape {found.shape}, expected {shape}"
            raise UserError(f"--resume: {path} is not of this drafter: tensor {name!r} {what}")
    try:
        progress = Progress(**json.loads(metadata["progress"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--resume: {path} is no checkpoint of a training run") from error
    # In the order of `like`: the norm of all gradients is a sum in that order, to the last bit.
    weights = tree_map_with_path(lambda name, _: arrays[f"drafter.{name}"], like)
    tree: Any = tree_unflatten(list(arrays.items()))
    return weights, tree.get("optimizer", {}), progress
