"""Prefix attention: one transformer layer over the committed text, of which a head reads the last row.

Row j reads the context h_j and the embedding of the token after it, e(x_{j+1}), and attends to the
rows of a window before it (Hydra's prefix attention, arXiv 2402.05109, section 4.2; the pairing of
a context with the next token is EAGLE's, arXiv 2401.15077). At the root, whose token is known
when drafting begins, what comes out is added to the projected context, once per step.
Knows nothing of trees and acceptance.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.llama import ModelArgs, TransformerBlock

from mlx_redrafter.drafting.drafter_files import Embedder

_HEAD_DIM = 64


class PrefixAttention(nn.Module):
    """The layer.

    Args:
        context_size, hidden_size, exit_dim: as in the drafter's config.
        window: rows that a row attends to, itself included.
    """

    def __init__(self, context_size: int, hidden_size: int, exit_dim: int, window: int):
        super().__init__()
        heads = hidden_size // _HEAD_DIM if hidden_size % _HEAD_DIM == 0 else 1
        self.window, self.heads = window, heads
        args = ModelArgs("llama", hidden_size, 1, 2 * hidden_size, heads, 1e-6, 1)
        self.input_context = nn.Linear(context_size, hidden_size, bias=False)
        self.input_token = nn.Linear(hidden_size, hidden_size, bias=False)
        self.layer = TransformerBlock(args)
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.output = nn.Linear(hidden_size, exit_dim, bias=False)

    def __call__(self, contexts: mx.array, embeddings: mx.array, memory: Memory | None = None) -> mx.array:
        """What is added to the projected context at every row.

        Args:
            contexts: (B, M, context_size) h_j of M rows in a row.
            embeddings: (B, M, hidden_size) of the token after each.
            memory: of the rows before these; gets these behind them.

        Returns:
            (B, M, exit_dim).
        """
        rows = self.input_context(contexts) + self.input_token(embeddings)
        count = contexts.shape[1]
        if memory is not None:
            mask = memory.mask(count)
        else:
            behind = mx.arange(count)[:, None] - mx.arange(count)
            mask = (behind >= 0) & (behind < self.window)
        result: mx.array = self.output(self.norm(self.layer(rows, mask, memory)))
        return result


class Memory:
    """Keys and values of the last rows that were read, newest last; looks to the layer like an mlx-lm cache.

    Attributes:
        keys, values: (B, heads, window, head_dim); of these the last `held` rows count.
        offset: (B,) int32 the position of the next row.
        held: (B,) int32.
    """

    def __init__(self, layer: PrefixAttention, batch: int, dtype: mx.Dtype):
        width = layer.layer.hidden_size // layer.heads
        self.window = layer.window
        self.keys = self.values = mx.zeros((batch, layer.heads, layer.window, width), dtype)
        self.offset = self.held = mx.zeros((batch,), mx.int32)

    def mask(self, count: int) -> mx.array:
        """(B, 1, count, window + count) bool: what each of so many new rows attends to."""
        seat, row = mx.arange(self.window + count), mx.arange(count)[:, None]
        near = (seat > row) & (seat <= self.window + row)
        return near & (seat >= (self.window - self.held)[:, None, None, None])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """All rows with new ones behind them, as the layer attends to them; `keep` says which of them stay."""
        self.keys = mx.concatenate([self.keys, keys], axis=2)
        self.values = mx.concatenate([self.values, values], axis=2)
        return self.keys, self.values

    def keep(self, count: mx.array | int) -> None:
        """Of the new rows the first (B,) or `count` stay; the oldest make room for them."""
        self.offset, self.held = self.offset + count, mx.minimum(self.held + count, self.window)
        if isinstance(count, int):
            kept = slice(count, count + self.window)
            self.keys, self.values = self.keys[:, :, kept], self.values[:, :, kept]
            return
        self.keys, self.values = _from_row(self.keys, count, self.window), _from_row(self.values, count, self.window)

    def arrays(self) -> list[mx.array]:
        return [self.keys, self.values, self.offset, self.held]

    def replace(self, arrays: list[mx.array]) -> None:
        """Takes other arrays, in the order of `arrays`."""
        self.keys, self.values, self.offset, self.held = arrays

    def drop(self, count: int) -> None:
        """Forgets the last rows."""
        self.offset, self.held = self.offset - count, mx.maximum(self.held - count, 0)
        seats = mx.maximum(mx.arange(self.window) - count, 0)
        self.keys, self.values = self.keys[:, :, seats], self.values[:, :, seats]


def _from_row(buffer: mx.array, first: mx.array, rows: int) -> mx.array:
    """Of a buffer (B, heads, n, width) so many rows of each text, from its own `first` (B,) on."""
    batch, heads, held, width = buffer.shape
    starts = mx.arange(0, batch * heads * held, held, dtype=mx.int32).reshape(batch, heads, 1)
    seats = starts + (first[:, None] + mx.arange(rows, dtype=mx.int32))[:, None, :]
    return buffer.reshape(-1, width)[seats]  # whole rows: to look up each number took five times as long


class PrefixReader:
    """What a head's prefix attention has read of one text, and what waits to be read.

    Rows wait until something is drafted: steps that decode plainly then cost nothing.

    Args:
        layer: the head's.
        embed: the target's embedding.
    """

    def __init__(self, layer: PrefixAttention, embed: Embedder):
        self.layer, self.embed = layer, embed
        self._memory: Memory | None = None
        # Contexts (B, m, context_size), the tokens after them (B, m), and how many of them count, if not all.
        self._waiting: list[tuple[mx.array, mx.array, mx.array | None]] = []
        self._last: mx.array | None = None

    def begin(self) -> None:
        """Forgets everything: another text begins."""
        self._memory, self._waiting, self._last = None, [], None

    def extend(self, contexts: mx.array, tokens: mx.array, count: mx.array | None = None) -> None:
        """Takes rows that were committed.

        Args:
            contexts: (B, m, context_size).
            tokens: (B, m) int32 the token after each.
            count: (B,) int32 how many of the rows count, at least 1; all if left out.
        """
        if count is None and self._waiting and self._waiting[-1][2] is None:
            before, known, _ = self._waiting.pop()
            contexts, tokens = mx.concatenate([before, contexts], axis=1), mx.concatenate([known, tokens], axis=1)
        if count is None and contexts.shape[1] >= self.layer.window:  # all before is beyond the window
            self.begin()
            contexts, tokens = contexts[:, -self.layer.window :], tokens[:, -self.layer.window :]
        self._waiting.append((contexts, tokens, count))

    def last(self) -> mx.array:
        """What is added to the projected context at the last row, (B, exit_dim); reads what waits."""
        for contexts, tokens, count in self._waiting:
            if self._memory is None:
                self._memory = Memory(self.layer, contexts.shape[0], contexts.dtype)
            found = self.layer(contexts, self.embed(tokens), self._memory)
            if count is None:
                self._memory.keep(contexts.shape[1])
                self._last = found[:, -1]
            else:
                self._memory.keep(count)
                self._last = mx.take_along_axis(found, (count - 1)[:, None, None], axis=1)[:, 0]
        self._waiting = []
        assert self._last is not None  # the prompt has a last row
        return self._last

    def drop(self, count: int) -> None:
        """Forgets the last rows: the text goes on from before them."""
        self.last()
        assert self._memory is not None
        if count:
            self._memory.drop(count)
        self._last = None

    def join(self, other: PrefixReader) -> None:
        """Takes the texts of another reader behind those of this one; both read what waits."""
        self._last = mx.concatenate([self.last(), other.last()])
        assert self._memory is not None and other._memory is not None
        parts = zip(self._memory.arrays(), other._memory.arrays())
        self._memory.replace([mx.concatenate([mine, theirs]) for mine, theirs in parts])

    def keep(self, texts: mx.array) -> None:
        """Keeps these texts, in this order."""
        self._last = self.last()[texts]
        assert self._memory is not None
        self._memory.replace([array[texts] for array in self._memory.arrays()])

    def arrays(self) -> list[mx.array]:
        """What goes on to the next step."""
        mine = [] if self._memory is None else self._memory.arrays()
        mine += [] if self._last is None else [self._last]
        return mine + [array for waiting in self._waiting for array in waiting if array is not None]
