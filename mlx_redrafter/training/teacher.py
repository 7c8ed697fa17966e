"""Reads rows of text with the frozen target and keeps what it made of them on disk.

Knows nothing of drafters, nor of which positions an update learns.
"""

from __future__ import annotations

import pathlib
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_redrafter.target.model import Target
from mlx_redrafter.training.loss import HARD, TEXT, Objective
from mlx_redrafter.training.row_cache import RowCache
from mlx_redrafter.training.text.shards import Rows


class Teacher:
    """Reads rows with the frozen target: one forward pass per row, then kept on disk.

    Every row is read alone, so that what is read depends neither on the batch nor on what
    was kept, bit for bit.

    Args:
        vocab_map: (n,) the target's ids of the draft vocabulary; None for all.
        folder: for the readings.
        budget: bytes they may take.
        context_layers: which hidden states are read; see `Target.forward`.

    Attributes:
        record: the type of a row's reading, T tokens with j labels each: `hidden` (T, context_size)
            bfloat16, as uint16; `ids` (T, j) draft tokens, there if `has_ids`, else `shares` has all;
            `shares` (T, j) float16 their probabilities, summing to 1; `mass` (T,) float16 the
            probability that the target gives to the draft vocabulary.
    """

    def __init__(
        self,
        target: Target,
        rows: Rows,
        objective: Objective,
        vocab_map: np.ndarray | None,
        folder: pathlib.Path,
        budget: int,
        context_layers: tuple[int, ...] = (),
    ):
        self.target, self.rows, self.objective, self.context_layers = target, rows, objective, context_layers
        self.size = target.vocab_size if vocab_map is None else len(vocab_map)
        self._map = None if vocab_map is None else mx.array(vocab_map, mx.int32)
        # Draft token of each of the target's, -1 for those that cannot be drafted.
        self._draft_of = np.arange(target.vocab_size, dtype=np.int32)
        if vocab_map is not None:
            self._draft_of = np.full(target.vocab_size, -1, np.int32)
            self._draft_of[vocab_map] = np.arange(len(vocab_map))
        labels = self._labels = 1 if not objective.soft else min(objective.top_k, self.size) or self.size
        self.has_ids = labels != self.size
        ids = [] if not self.has_ids else [("ids", "<u2" if self.size <= 2**16 else "<i4", (rows.length, labels))]
        hidden = ("hidden", "<u2", (rows.length, target.context_size(context_layers)))
        shares = ("shares", "<f2", (rows.length, labels))
        self.record = np.dtype([hidden, *ids, shares, ("mass", "<f2", (rows.length,))])
        self._cache = RowCache(folder, self.record.itemsize, budget)

    def __len__(self) -> int:
        """Rows to train on."""
        return len(self.rows) - self.rows.held_out

    def holds(self, row: int) -> bool:
        """Whether what the target made of a row is kept."""
        return self._cache.holds(row)

    def read(self, picks: np.ndarray, anew: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (B, T) int32 of the picked rows, and what the target made of them: (B,) records.

        Args:
            anew: the target reads them whatever is kept.
        """
        tokens, counts = self.rows[picks]
        reading = np.zeros(len(tokens), self.record)
        for i, row in enumerate(picks):
            kept = None if anew else self._cache.get(int(row))
            if kept is None:
                self._ask(tokens[i], counts[i], reading[i])
                self._cache.put(int(row), reading[i].tobytes())
            else:
                reading[i] = np.frombuffer(kept, self.record)[0]
        return tokens, reading

    def close(self) -> None:
        self._cache.close()

    def _ask(self, tokens: np.ndarray, counts: np.ndarray, reading: np.void) -> None:
        """Reads one row (T,) as far as its last token that is to be learned; what lies behind stays zero."""
        used = tokens[None, : max(2, int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 0)]
        caches: list[Any] = [None] * len(self.target.model.layers)
        hidden, logits = self.target.forward(mx.array(used), caches, context_layers=self.context_layers)
        assert hidden is not None  # the command refuses targets that give none
        ids, shares, mass = self._text_labels(used) if self.objective.labels == TEXT else self._own_labels(logits)
        hidden = hidden.astype(mx.bfloat16).view(mx.uint16)
        found = {"hidden": hidden, "ids": ids, "shares": shares, "mass": mass}
        mx.eval(found)
        for name in self.record.names or ():
            reading[name][: used.shape[1]] = np.array(found[name])[0]

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
        if self._labels == self.size:
            return mx.zeros((*mass.shape, 1)), mx.softmax(logits, axis=-1), mass
        ids = mx.argpartition(-logits, self._labels - 1, axis=-1)[..., : self._labels]
        return ids, mx.softmax(mx.take_along_axis(logits, ids, axis=-1), axis=-1), mass

    def _text_labels(self, tokens: np.ndarray) -> tuple[mx.array, mx.array, mx.array]:
        """The token that follows; the last position, which none follows, has no label."""
        following = np.concatenate([self._draft_of[tokens[:, 1:]], np.full((len(tokens), 1), -1)], axis=1)
        ids = mx.array(np.maximum(following, 0))[..., None]
        return ids, mx.ones(ids.shape), mx.array((following >= 0).astype(np.float32))
