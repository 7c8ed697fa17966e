"""One layer's keys and values: mlx-lm's caches, which also take a tree's rows behind the committed ones.

Knows nothing of other layers. To the model these caches look like mlx-lm's own (`make_mask`,
`update_and_fetch`, `offset`, `state`), and until the first tree is written they are exactly
that: the prompt goes through mlx-lm's code. From then on rows lie in the order of their
positions, row p at index p - base; a window's base moves on from time to time, a whole
cache's stays 0.

On a CPU each layer sends its rows off while the graph of those above it is still being
built. MLX lets the host run about a hundred operations ahead there, so a step submitted as
a whole keeps the device waiting while the next one is built. A GPU's command buffers reach
further ahead than a step, and each submission would cost one.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache as PlainKVCache
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache

from mlx_redrafter.target.tree import Places, TreeFrame

BLOCK, LEAST = 256, 64  # rows by which the buffers of one text grow, and of many texts each
READ_BLOCK = 32  # attention reads the bound on the length rounded up to this


class TreeRows:
    """Mixed into one of mlx-lm's caches, makes it take trees.

    Keys and values are arrays (B, kv_heads, capacity, width), or tuples of such arrays
    where they are quantised.

    Attributes:
        frame: of the verification that is going on.
        base: position of the first row in the buffers.
        rows: the last tree's keys and values, as the buffers keep them.
        pending: rows of an accepted path and where they go. The next verification
            writes them, in front of its own rows: MLX updates a buffer in place only where no
            earlier operation still has to read it, which is sure a whole pass later.
        window: how many rows up to itself a row sees; None for all.
    """

    frame: TreeFrame | None = None
    base = 0
    rows: Any = None
    pending: tuple[Any, Places] | None = None
    window: int | None = None
    step: int  # rows by which mlx-lm's code grows the buffers
    keys: Any
    values: Any
    _offset: int
    _span = (0, 0)  # the first position that attention reads, and how many

    # `offset` is a plain attribute in mlx-lm; here it depends on whether a tree is being read.
    @property
    def offset(self) -> Any:
        return self._offset if self.frame is None else self.frame.offset

    @offset.setter
    def offset(self, value: int) -> None:
        self._offset = value

    def prepare(self, frame: TreeFrame) -> None:
        """Makes room for a verification, letting go of rows that no window reaches any more."""
        self.flush()
        self.frame = frame
        start = self.base if self.window is None else max(self.base, frame.low - self.window + 1)
        self._span = start, -(-(frame.bound + frame.before + frame.rows - start) // READ_BLOCK) * READ_BLOCK
        if self.keys is not None:
            self.reserve(start - self.base + self._span[1], drop=start - self.base)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        if self.frame is None:
            return super().make_mask(N, return_array=return_array, window_size=window_size)  # type: ignore[misc]
        windows = [w for w in (self.window, window_size) if w is not None]
        return self.frame.mask(*self._span, min(windows, default=None))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        submit_part(keys, values)
        frame = self.frame
        if frame is None:
            return super().update_and_fetch(keys, values)  # type: ignore[misc]
        if frame.replaying:
            return keys, values
        if frame.split_rows:
            keys, values = frame.joined(keys), frame.joined(values)
        self.rows = self.encode(keys), self.encode(values)
        self.keys, self.values = map_arrays(frame.places.write, (self.keys, self.values), self.rows, base=self.base)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        """What attention reads; layers that share another's rows ask for it."""
        if self.frame is None:
            return super().keys_and_values()  # type: ignore[misc]
        first, visible = self._span[0] - self.base, self._span[1]
        rows = operator.itemgetter((..., slice(first, first + visible), slice(None)))
        read = map_arrays(rows, (self.keys, self.values))
        return map_arrays(self.frame.for_split_rows, read) if self.frame.split_rows else read

    def encode(self, rows: mx.array) -> Any:
        """Rows in the form that the buffers keep them in."""
        return rows

    def move(self, path: Path) -> None:
        """Moves one path's rows together behind the first tree row."""
        if self.rows is not None:
            self.pending = map_arrays(path.rows, self.rows), path.places

    def flush(self) -> None:
        """Writes the rows of an accepted path that are still to be moved."""
        if self.pending is not None:
            rows, places = self.pending
            self.keys, self.values = map_arrays(places.write, (self.keys, self.values), rows, base=self.base)
            self.pending = None

    def map(self, function: Callable[[mx.array], mx.array]) -> None:
        """Replaces every buffer by what the function makes of it."""
        if self.keys is not None:
            self.keys, self.values = map_arrays(function, (self.keys, self.values))

    def reserve(self, rows: int, drop: int = 0) -> None:
        """Grows the buffers to hold at least `rows` rows, in whole blocks; the first `drop` may go for that."""
        batch, _, capacity, _ = (self.keys if isinstance(self.keys, mx.array) else self.keys[0]).shape
        block = max(LEAST, BLOCK // batch)
        more = -(-(rows - capacity) // block) * block
        if more <= 0:
            return

        def grow(buffer: mx.array) -> mx.array:
            room = mx.zeros((*buffer.shape[:2], more, buffer.shape[3]), buffer.dtype)
            return mx.concatenate([buffer[:, :, drop:], room], axis=2)

        self.keys, self.values = map_arrays(grow, (self.keys, self.values))
        self.base += drop

    def room(self, bound: int) -> int:
        """How many rows of the buffers have to be there where no text is longer than the bound, and few more follow."""
        capacity = (self.keys if isinstance(self.keys, mx.array) else self.keys[0]).shape[2]
        return min(capacity, -(-(bound - self.base + READ_BLOCK) // LEAST) * LEAST)

    def end(self, length: int) -> None:
        """Back to what mlx-lm's cache is after `length` tokens."""
        self.flush()
        self.rows = None
        self.offset = length

    def arrays(self) -> list[mx.array]:
        found: list[mx.array] = []
        if self.keys is not None:
            map_arrays(found.append, (self.keys, self.values))
        if self.pending is not None:
            map_arrays(found.append, self.pending[0])
            found.append(self.pending[1].position)
        return found


class LayerCache(TreeRows, PlainKVCache):
    """One layer's keys and values as the model makes them."""

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> QuantizedLayerCache:
        self.flush()
        return with_contents(QuantizedLayerCache(group_size, bits), super().to_quantized(group_size, bits))


class QuantizedLayerCache(TreeRows, QuantizedKVCache):
    """One layer's keys and values in 8 or fewer bits, quantised row by row."""

    def encode(self, rows: mx.array) -> Any:
        return mx.quantize(rows, group_size=self.group_size, bits=self.bits)


class WindowCache(TreeRows, RotatingKVCache):  # type: ignore[misc]  # argument names of make_mask
    """One layer's last keys and values: a window, and some slack for rows that may be taken back.

    While trees are written the rows lie in order and are moved to the front once in a
    block, so that memory stays at window + slack; mlx-lm's own order is a ring.
    """

    @property
    def window(self) -> int:  # type: ignore[override]
        return self.max_size

    def in_order(self) -> None:
        """Turns mlx-lm's ring into rows in order: the prompt has been read, trees follow."""
        if self.keys is None:
            return
        rows = min(self._offset, self.max_size)
        self.map(lambda buffer: self._temporal_order(buffer)[:, :, -rows:])
        self.base = self._offset - rows

    def end(self, length: int) -> None:
        super().end(length)
        if self.keys is not None:
            first = max(length - self.max_size, 0) - self.base
            assert first >= 0  # rows below the base are gone
            self.map(lambda buffer: buffer[:, :, first : length - self.base])
            self._idx = self.keys.shape[2]
        self.base = 0


def with_contents(layer: Any, of: Any) -> Any:
    """`layer` with the contents of another cache of its kind; buffers are shared."""
    layer.keys, layer.values, layer.offset = of.keys, of.values, of.offset
    if isinstance(layer, RotatingKVCache):
        layer._idx = of._idx
    return layer


class Path:
    """One path of a tree (B, D) int32, and where its rows go: behind the root's, which is at position (B,)."""

    def __init__(self, path: mx.array, root: mx.array):
        self.places = Places(root + 1)
        self._index = path[0] if path.shape[0] == 1 else path[:, None, :, None]

    def rows(self, rows: mx.array) -> mx.array:
        """(B, heads, D, width) the path's, of (B, heads, M, width) of a tree."""
        if rows.shape[0] == 1:
            return mx.take(rows, self._index, axis=2)
        return mx.take_along_axis(rows, self._index, axis=2)


def map_arrays(function: Callable[..., Any], *buffers: Any, **options: Any) -> Any:
    """The function of every array in buffers of one structure: arrays, or tuples of what is one.

    As mlx's tree_map, which takes a tenth of the time that building a step takes.

    Args:
        options: handed to every call as they are.
    """
    if isinstance(buffers[0], mx.array):
        return function(*buffers, **options)
    return tuple(map_arrays(function, *parts, **options) for parts in zip(*buffers))


_whole = False  # while it is True, nothing is sent before its graph is complete


def submit_part(*arrays: mx.array) -> None:
    """Starts computing arrays that a graph under construction has come to; on a GPU, nothing."""
    if not _whole and mx.default_device() == mx.cpu:
        mx.async_eval(*arrays)


@contextlib.contextmanager
def in_one_piece() -> Iterator[None]:
    """While it lasts, graphs are only built, as on a GPU: to be traced, or timed apart from their building."""
    global _whole
    before, _whole = _whole, True
    try:
        yield
    finally:
        _whole = before
