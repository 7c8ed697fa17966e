"""What a drafter with a cache of its own has read of one text, and what waits to be read.

Rows wait until something is drafted, or until they take too much memory: steps that decode plainly cost next to
nothing. What a step accepts is read once more, whatever proposed it, so drafts of other proposers, whole trees and
plain steps are all the same.
Knows nothing of beams.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

import mlx.core as mx

from mlx_redrafter.target.cache.kv_cache import KVCache, leaves
from mlx_redrafter.target.cache.recurrent import RecurrentCache
from mlx_redrafter.target.cache.rows import join, keep
from mlx_redrafter.target.tree import CandidateTree

CHUNK = 128  # rows of a prompt read at a time
PIECE = 32  # rows, and waiting parts, that are read or put together at a time later
LONGEST = 512  # rows of all texts behind their prompts that wait at most where they have contexts, which are kilobytes


class Reader(Protocol):
    """A drafter as its memory sees it; see `DraftModel` for the methods."""

    def make_cache(self) -> KVCache: ...

    def prefill(
        self, tokens: mx.array, contexts: mx.array | None, cache: KVCache
    ) -> tuple[mx.array | None, mx.array]: ...

    def read(
        self, tree: CandidateTree, contexts: mx.array | None, cache: KVCache, at: mx.array | None = None
    ) -> tuple[mx.array | None, mx.array]: ...


@dataclasses.dataclass(eq=False)
class Rows:
    """Rows of the text in order.

    Attributes:
        tokens: (B, m) int32.
        contexts: (B, m, context_size) for drafters that read them.
        count: (B,) int32 how many of the rows count, at least 1; None for all.
        read: they are in the cache.
    """

    tokens: mx.array
    contexts: mx.array | None
    count: mx.array | None
    read: bool = False

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.tokens[:, part], None if self.contexts is None else self.contexts[:, part], None)


class Memory:
    """Of one text."""

    def __init__(self, reader: Reader):
        self.reader = reader
        self.cache: KVCache | None = None
        self._begun = False  # the prompt is in the cache, and rows are read behind it
        self._waiting: list[Rows] = []
        # Of whose count the host has not been told: a step or two; in batches it is told of none.
        self._unknown: deque[Rows] = deque(maxlen=4)
        self._found: tuple[mx.array | None, mx.array] | None = None  # what the last row says, where it was read early
        # Of batches: a length that the next step to be read computes, and how many rows had been added by then.
        self._told: tuple[mx.array, int] | None = None
        self._added = 0

    def begin(self, tokens: mx.array, contexts: mx.array | None) -> None:
        """Takes the first rows, at least one; behind those that the cache holds, if it is there."""
        self._waiting = _joined([*self._waiting, Rows(tokens, contexts, None)])
        self._unknown.clear()

    def extend(self, tokens: mx.array, contexts: mx.array | None, count: mx.array | None) -> None:
        """Takes rows that a step committed; `count` as in `Rows`."""
        rows = Rows(tokens, contexts, count)
        self._waiting.append(rows)
        self._unknown.append(rows)
        if len(self._waiting) > PIECE:  # of many plain steps; the prompt stays apart
            runs = itertools.groupby(self._waiting[1:], lambda r: r.count is None and r not in self._unknown)
            self._waiting[1:] = [r for exact, run in runs for r in (_joined(list(run)) if exact else run)]
            behind = self._waiting if self._begun else self._waiting[1:]
            if contexts is not None and sum(r.tokens.size for r in behind) > LONGEST:
                self._found = self.last()

    def learn(self, count: int) -> None:
        """Is told how many rows of the oldest step not known so far count (batch size 1)."""
        rows = self._unknown.popleft()
        if rows.read:
            assert self.cache is not None
            self.cache.tighten(self.cache.bound - (rows.tokens.shape[1] - count))
            return
        exact = rows[:count]
        rows.tokens, rows.contexts, rows.count = exact.tokens, exact.contexts, None

    def tighten(self, longest: int) -> None:
        """Is told that no text has more tokens, and so no more rows; called when a step has been read."""
        if self.cache is None or not self._begun:
            return
        if self._told is not None:
            length, added = self._told
            known: Any = length.tolist()
            self.cache.low = max(self.cache.low, min(known))
            longest = min(longest, max(known) + self._added - added)
        self._told = None if self.cache.length is None else (self.cache.length, self._added)
        self.cache.bound = min(self.cache.bound, longest)

    def last(self) -> tuple[mx.array | None, mx.array]:
        """Reads what waits, and gives what the last row says: contexts for rows behind it, (B, width), and scores."""
        found, self._found = self._found, None
        if self.cache is None:
            self.cache = self.reader.make_cache()
        if not self._begun:
            first = self._waiting.pop(0)
            found = self._prefill(first)
        waiting, self._waiting = self._waiting, []
        while waiting:
            # Rows of which all count can be read in one go with those behind them.
            some = next((i for i, rows in enumerate(waiting) if rows.count is not None), len(waiting) - 1) + 1
            [rows] = _joined(waiting[:some])
            for each in waiting[:some]:
                each.read = True
            waiting = waiting[some:]
            while rows.tokens.shape[1] > 2 * PIECE:
                self._read(rows[:PIECE])
                rows = dataclasses.replace(rows[PIECE:], count=None if rows.count is None else rows.count - PIECE)
            found = self._read(rows)
        assert found is not None  # every step brings a row at least
        return found

    def _prefill(self, rows: Rows) -> tuple[mx.array | None, mx.array]:
        assert self.cache is not None
        held, size = self.cache.bound, rows.tokens.shape[1]
        for start in range(0, size, CHUNK):
            part = rows[start : start + CHUNK]
            hidden, scores = self.reader.prefill(part.tokens, part.contexts, self.cache)
            if start + CHUNK < size:  # so that no graph of the whole prompt comes together
                mx.async_eval(self.cache.arrays())
        self.cache.begin_trees(rows.tokens.shape[0], length=held + size)
        self._begun = True
        return None if hidden is None else hidden[:, 0], scores[:, 0]

    def _read(self, rows: Rows) -> tuple[mx.array | None, mx.array]:
        assert self.cache is not None
        batch, size = rows.tokens.shape
        count = mx.full((batch,), size, mx.int32) if rows.count is None else rows.count
        chain = CandidateTree.chain(rows.tokens)
        hidden, scores = self.reader.read(chain, rows.contexts, self.cache, at=count - 1)
        self.cache.commit(None, count - 1, size - 1)
        self._added += size
        return None if hidden is None else hidden[:, 0], scores[:, 0]

    def join(self, other: Memory) -> None:
        """Takes the texts of another memory of the same drafter behind those of this one."""
        (hidden, scores), (their_hidden, their_scores) = self.last(), other.last()
        assert self.cache is not None and other.cache is not None
        join(self.cache, other.cache)
        self._told = None
        together = None if hidden is None or their_hidden is None else mx.concatenate([hidden, their_hidden])
        self._found = together, mx.concatenate([scores, their_scores])

    def keep(self, texts: list[int]) -> None:
        """Keeps these texts, in this order."""
        index, self._told = mx.array(texts), None
        if self.cache is not None and self._begun:
            keep(self.cache, texts)
        for part in self._waiting:
            part.tokens = part.tokens[index]
            part.contexts = None if part.contexts is None else part.contexts[index]
            part.count = None if part.count is None else part.count[index]
        if self._found is not None:
            hidden, scores = self._found
            self._found = None if hidden is None else hidden[index], scores[index]

    @contextlib.contextmanager
    def drafting(self) -> Iterator[KVCache]:
        """While it lasts, rows may be read behind the text; all of them are forgotten then."""
        assert self.cache is not None
        states = [(c, list(c.cache)) for c in leaves(self.cache.layers) if isinstance(c, RecurrentCache)]
        try:
            yield self.cache
        finally:
            for layer, before in states:
                layer.cache = before

    def cut(self, rows: int) -> bool:
        """Goes back to a beginning of the text of so many rows (batch size 1).

        Returns:
            False where not all of them are here.
        """
        known = _joined([rows for rows in self._waiting if rows not in self._unknown])
        self._waiting, self._found = [], None
        self._unknown.clear()
        if self.cache is None or not self._begun:
            return False
        length: Any = self.cache.length
        held = min(length.item(), rows)
        self.cache.end_trees(held)
        self.cache.bound, self._begun = held, False
        if held < rows:
            if not known or known[0].tokens.shape[1] < rows - held:
                return False
            self._waiting = [known[0][: rows - held]]
        mx.eval(self.arrays())
        return True

    def arrays(self) -> list[mx.array]:
        """What goes on to the next step."""
        mine = [] if self.cache is None else self.cache.arrays()
        parts = [part for rows in self._waiting for part in (rows.tokens, rows.contexts, rows.count)]
        parts += [] if self._found is None else self._found
        return mine + [part for part in parts if part is not None]


def _joined(parts: list[Rows]) -> list[Rows]:
    """One part of several, of which only the last may not count as a whole; none of none."""
    if len(parts) < 2:
        return parts
    last = parts[-1].count
    before = sum(part.tokens.shape[1] for part in parts[:-1])
    tokens = mx.concatenate([part.tokens for part in parts], axis=1)
    contexts = [part.contexts for part in parts if part.contexts is not None]
    together = mx.concatenate(contexts, axis=1) if contexts else None
    return [Rows(tokens, together, None if last is None else last + before)]
