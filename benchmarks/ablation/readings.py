"""Shares what the target made of a text between trainings that read different parts of it.

One teacher reads all layers that any of them asks for, and each gets a view of its own.
Knows nothing of recipes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_redrafter.errors import UserError
from mlx_redrafter.training.loss import Objective
from mlx_redrafter.training.teacher import Teacher


class View:
    """A teacher's readings as another drafter would have asked for them; stands for a `Teacher` in training.

    Args:
        teacher: whose labels are the most probable tokens.
        picks: which of its rows there are.
        objective: of the training.
        layers: the layers that the drafter reads, as `Target.forward` takes them; some of the teacher's.
        vocab_map: the target's ids of the drafter's vocabulary; None for all.
        teachers_map: the same of the teacher's.
    """

    has_ids = True

    def __init__(
        self,
        teacher: Teacher,
        picks: np.ndarray,
        objective: Objective,
        layers: tuple[int, ...],
        vocab_map: np.ndarray | None,
        teachers_map: np.ndarray | None,
    ):
        target = teacher.target
        self.teacher, self.picks, self.objective = teacher, picks, objective
        self.target, self.rows = target, _Rows(teacher.rows, picks)
        self.size = target.vocab_size if vocab_map is None else len(vocab_map)
        width, last = target.hidden_size, target.num_layers
        places = [list(teacher.context_layers or (last,)).index(layer) for layer in layers or (last,)]
        self._columns = np.concatenate([np.arange(place * width, (place + 1) * width) for place in places])
        place_of = np.arange(target.vocab_size)
        if vocab_map is not None:
            place_of = np.full(target.vocab_size, -1)
            place_of[vocab_map] = np.arange(len(vocab_map))
        # The drafter's token of each of the teacher's, -1 where it has none.
        self._draft_of = place_of if teachers_map is None else place_of[teachers_map]
        self._same = bool((self._draft_of == np.arange(len(self._draft_of))).all())

    def __len__(self) -> int:
        return len(self.picks)

    def read(self, picks: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """As `Teacher.read`."""
        tokens, reading = self.teacher.read(self.picks[picks])
        ids, shares, mass = reading["ids"].astype(np.int64), reading["shares"], reading["mass"]
        if not self._same:
            ids = self._draft_of[ids]
            kept = np.where(ids >= 0, shares.astype(np.float32), 0)
            held = kept.sum(axis=-1)
            shares, mass = kept / np.maximum(held, 1e-9)[..., None], mass * held
        hidden = reading["hidden"]
        if len(self._columns) < hidden.shape[-1]:
            hidden = hidden[..., self._columns]
        return tokens, {"hidden": hidden, "ids": np.maximum(ids, 0), "shares": shares, "mass": mass}


class _Rows:
    """Some rows of a text, as trainings read them."""

    def __init__(self, rows: Any, picks: np.ndarray):
        self._rows, self._picks = rows, picks
        self.length, self.held_out = rows.length, 0

    def __len__(self) -> int:
        return len(self._picks)

    def __getitem__(self, picks: Any) -> tuple[np.ndarray, np.ndarray]:
        tokens, counts = self._rows[self._picks[picks]]
        return tokens, counts


def read_all(teacher: Teacher, picks: np.ndarray, budget: int) -> None:
    """Lets the target read every row once, or what is missing of that.

    Raises:
        UserError: the readings need more than `budget` bytes, or those that are kept are of another target or text.
    """
    needed = len(picks) * teacher.record.itemsize
    if needed > budget:
        most = budget // teacher.record.itemsize
        raise UserError(
            f"--rows {len(picks)}: what the target makes of them takes {needed / 1e9:.1f} GB, there is room for"
            f" {budget / 1e9:.1f} (--cache-gb, the disk); {most} rows would fit"
        )
    missing = [row for row in picks.tolist() if not teacher.holds(row)]
    if len(missing) < len(picks):
        kept = next(row for row in picks.tolist() if teacher.holds(row))
        if not _alike(*(teacher.read(np.array([kept]), anew)[1][0] for anew in (False, True))):
            raise UserError("the readings that --work holds are of another target or text; use a new directory")
    for row in tqdm(missing, desc="reading", unit="row"):
        teacher.read(np.array([row]))


def _alike(before: np.void, now: np.void) -> bool:
    """Whether two readings of a row differ by rounding only."""
    labels = [np.sort(reading["ids"], axis=-1) for reading in (before, now)]
    kept, fresh = ((reading["hidden"].astype(np.uint32) << 16).view(np.float32) for reading in (before, now))
    return bool(np.mean(labels[0] == labels[1]) > 0.9 and np.allclose(kept, fresh, rtol=0.05, atol=0.05))
