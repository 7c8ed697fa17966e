"""Reads rows of text with the frozen target and keeps what it made of them on disk.

Knows nothing of drafters, nor of which positions an update learns.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_redrafter.target.model import Target
from mlx_redrafter.training.loss import HARD, KL, TEXT, Objective
from mlx_redrafter.training.row_cache import RowCache

_LOGIT_BYTES = 1 << 28  # logits of the target at a time


class Rows(Protocol):
    """Rows of text of equal length; the last `held_out` of them are not for training."""

    length: int
    held_out: int

    def __len__(self) -> int: ...

    def __getitem__(self, picks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """tokens (B, length) int32 and whether each is to be learned (B, length) bool."""
        ...


@dataclasses.dataclass
class Reading:
    """The target's reading of B rows of T tokens.

    Attributes:
        hidden: (B, T, hidden_size) bfloat16, as uint16.
        ids: (B, T, j) draft tokens; None where `shares` has all of them.
        shares: (B, T, j) float16 their probabilities, summing to 1.
        mass: (B, T) float16 probability that the target gives to the draft vocabulary.
    """

    hidden: np.ndarray
    ids: np.ndarray | None
    shares: np.ndarray
    mass: np.ndarray


class Teacher:
    """Reads rows with the frozen target: one forward pass per row, then kept on disk.

    A row that is not kept is read again together with its whole batch, so that what is read
    does not depend on what was kept, bit for bit.

    Args:
        target: the model.
        rows: the text.
        objective: what is wanted of it.
        vocab_map: (n,) the target's ids of the draft vocabulary; None for all.
        folder: for the readings.
        budget: bytes they may take.
    """

    def __init__(
        self,
        target: Target,
        rows: Rows,
        objective: Objective,
        vocab_map: np.ndarray | None,
        folder: pathlib.Path,
        budget: int,
    ):
        self.target, self.rows, self.objective = target, rows, objective
        self.size = target.vocab_size if vocab_map is None else len(vocab_map)
        self._map = None if vocab_map is None else mx.array(vocab_map, mx.int32)
        # Draft token of each of the target's, -1 for those that cannot be drafted.
        self._draft_of = np.arange(target.vocab_size, dtype=np.int32)
        if vocab_map is not None:
            self._draft_of = np.full(target.vocab_size, -1, np.int32)
            self._draft_of[vocab_map] = np.arange(len(vocab_map))
        self._per_position = self._labels_per_position()
        self._fields = self._record_fields()
        size = sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in self._fields.values())
        self._cache = RowCache(folder, size, budget)

    def __len__(self) -> int:
        """Rows to train on."""
        return len(self.rows) - self.rows.held_out

    def read(self, picks: np.ndarray) -> tuple[np.ndarray, Reading]:
        """Tokens (B, T) int32 of the picked rows, and what the target made of them."""
        tokens, _ = self.rows[picks]
        kept = [self._cache.get(int(row)) for row in picks]
        fields = self._ask(tokens) if None in kept else {}
        records: list[bytes] = []
        for i, (row, record) in enumerate(zip(picks, kept, strict=True)):
            if record is None:
                record = b"".join(fields[name][i].tobytes() for name in self._fields)
                self._cache.put(int(row), record)
            records.append(record)
        return tokens, self._unpack(records)

    def close(self) -> None:
        self._cache.close()

    def _labels_per_position(self) -> int:
        if self.objective.labels != KL:
            return 1
        return min(self.objective.top_k, self.size) or self.size

    def _record_fields(self) -> dict[str, tuple[tuple[int, ...], str]]:
        length, j = self.rows.length, self._per_position
        ids = {} if j == self.size else {"ids": ((length, j), "uint16" if self.size <= 2**16 else "int32")}
        hidden = ((length, self.target.hidden_size), "uint16")
        return {"hidden": hidden, **ids, "shares": ((length, j), "float16"), "mass": ((length,), "float16")}

    def _unpack(self, records: list[bytes]) -> Reading:
        parts: dict[str, np.ndarray] = {}
        at = 0
        table = np.stack([np.frombuffer(record, np.uint8) for record in records])
        for name, (shape, kind) in self._fields.items():
            size = int(np.prod(shape)) * np.dtype(kind).itemsize
            parts[name] = np.ascontiguousarray(table[:, at : at + size]).view(kind).reshape(len(records), *shape)
            at += size
        return Reading(parts["hidden"], parts.get("ids"), parts["shares"], parts["mass"])

    def _ask(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """One pass of the target, as many rows at a time as its logits have room for."""
        at_once = max(1, _LOGIT_BYTES // (4 * tokens.shape[1] * self.target.vocab_size))
        parts: list[list[np.ndarray]] = []
        for first in range(0, len(tokens), at_once):
            block = tokens[first : first + at_once]
            hidden, logits = self.target.forward(mx.array(block), [None] * len(self.target.model.layers))
            assert hidden is not None  # the command refuses targets that give none
            labels = self._text_labels(block) if self.objective.labels == TEXT else self._own_labels(logits)
            hidden = hidden.astype(mx.bfloat16).view(mx.uint16)
            mx.eval(hidden, labels)
            parts.append([np.array(part) for part in (hidden, *labels)])
        joined = [np.concatenate(part) for part in zip(*parts, strict=True)]
        found = dict(zip(("hidden", "ids", "shares", "mass"), joined, strict=True))
        return {name: found[name].astype(kind) for name, (_, kind) in self._fields.items()}

    def _own_labels(self, logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """ids, shares and mass as the target's logits (B, T, vocab) have them."""
        logits = logits.astype(mx.float32)
        mass = mx.ones(logits.shape[:-1])
        if self.objective.labels == HARD:
            best = mx.argmax(logits, axis=-1)
            ids = mx.array(self._draft_of)[best][..., None]
            return mx.maximum(ids, 0), mx.ones(ids.shape), (ids[..., 0] >= 0).astype(mx.float32)
        logits = logits / self.objective.temperature
        if self._map is not None:
            everything = mx.logsumexp(logits, axis=-1)
            logits = logits[..., self._map]
            mass = mx.exp(mx.logsumexp(logits, axis=-1) - everything)
        if self._per_position == self.size:
            return mx.zeros((*mass.shape, 1)), mx.softmax(logits, axis=-1), mass
        ids = mx.argpartition(-logits, self._per_position - 1, axis=-1)[..., : self._per_position]
        return ids, mx.softmax(mx.take_along_axis(logits, ids, axis=-1), axis=-1), mass

    def _text_labels(self, tokens: np.ndarray) -> tuple[mx.array, mx.array, mx.array]:
        """The token that follows; the last position, which none follows, has no label."""
        following = np.concatenate([self._draft_of[tokens[:, 1:]], np.full((len(tokens), 1), -1)], axis=1)
        ids = mx.array(np.maximum(following, 0))[..., None]
        return ids, mx.ones(ids.shape), mx.array((following >= 0).astype(np.float32))
