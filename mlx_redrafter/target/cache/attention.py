"""One layer's keys and values: mlx-lm's caches, taught to take a tree's rows behind the committed ones.

To the model they look like mlx-lm's own (`make_mask`, `update_and_fetch`, `offset`,
`state`), and until the first tree is written they are exactly that: the prompt goes
through mlx-lm's code. From then on rows lie in the order of their positions, row p at
index p - base; a window's base moves on from time to time, a whole cache's stays 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache as PlainKVCache
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache

from mlx_redrafter.system.partial_submit import submit_part

BLOCK = 256  # rows by which buffers grow
READ_BLOCK = 32  # attention reads the bound on the length rounded up to this


@dataclasses.dataclass
class TreeFrame:
    """What all layers share during one verification: where rows go, what they see, where they stand.

    Attributes:
        length: committed rows, (B,) int32, on the device.
        depths: (B, M) int32 distance of each row from the root.
        ancestors: (B, M, M) bool; [b, i, j] is True where row i may look at row j.
        chain: rows stand in consecutive positions, and the model is told only the first.
        split_rows: the model gets each row as a batch entry of its own, (B * M, 1), for it knows
            positions per entry only.
        bound: no length is above it.
        low: no length is below it, nor will it be after rows were taken back.
        replaying: layers with a state are being brought to where the accepted rows end.
    """

    length: mx.array
    depths: mx.array
    ancestors: mx.array
    chain: bool
    bound: int
    low: int
    split_rows: bool = False
    replaying: bool = False

    def __post_init__(self) -> None:
        #: What the model hands to its rope: (B, M) positions, (B,) the first ones, or (B * M,).
        self.offset = self.length if self.chain else self.length[:, None] + self.depths
        if self.split_rows:
            self.offset = self.offset.reshape(-1)
        #: (B, M), all True: the mask that layers with a state are given.
        self.every_row = mx.ones(self.depths.shape, mx.bool_)
        self._masks: dict[tuple[int, int, int | None], mx.array] = {}

    @property
    def rows(self) -> int:
        return self.depths.shape[1]

    def mask(self, start: int, visible: int, window: int | None) -> mx.array:
        """(B, 1, M, visible) bool, or (B * M, 1, 1, visible); columns begin at position `start`; made only once."""
        key = (start, visible, window)
        if key not in self._masks:
            mask = tree_mask(self.ancestors, self.length, visible, start, self.depths, window)
            self._masks[key] = mask.reshape(-1, 1, 1, visible) if self.split_rows else mask
        return self._masks[key]

    def together(self, rows: mx.array) -> mx.array:
        """(B, heads, M, width) of what the model made of its rows."""
        if not self.split_rows:
            return rows
        batch, heads, width = self.length.shape[0], rows.shape[1], rows.shape[3]
        return rows.reshape(batch, self.rows, heads, width).swapaxes(1, 2)

    def to_all(self, buffer: mx.array) -> mx.array:
        """A buffer as every row of the model's batch reads it."""
        if not self.split_rows:
            return buffer
        if buffer.shape[0] == 1:
            return mx.broadcast_to(buffer, (self.rows, *buffer.shape[1:]))
        return mx.repeat(buffer, self.rows, axis=0)

    def made(self, value: Any) -> bool:
        """Whether this is one of the masks that `mask` returned."""
        return any(value is mask for mask in self._masks.values())


class TreeRows:
    """What turns one of mlx-lm's caches into one that takes trees.

    Keys and values are arrays (B, kv_heads, capacity, width), or tuples of such arrays
    where they are quantised.

    Attributes:
        frame: of the verification that is going on.
        base: position of the first row in the buffers.
        rows: the last tree's keys and values, as the buffers keep them.
        moving: of an accepted path, its rows and the position they go to. They are written
            by the next verification, in front of its own rows: MLX updates a buffer in place
            only where nothing before still has to read it, which is sure a whole pass later.
        window: how many rows up to itself a row sees; None for all.
    """

    frame: TreeFrame | None = None
    base = 0
    rows: Any = None
    moving: tuple[Any, mx.array] | None = None
    window: int | None = None
    keys: Any
    values: Any
    _offset: int

    # `offset` is a plain attribute in mlx-lm; here it depends on whether a tree is being read.
    @property
    def offset(self) -> Any:
        return self._offset if self.frame is None else self.frame.offset

    @offset.setter
    def offset(self, value: int) -> None:
        self._offset = value

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        if self.frame is None:
            return super().make_mask(N, return_array=return_array, window_size=window_size)  # type: ignore[misc]
        windows = [w for w in (self.window, window_size) if w is not None]
        start, visible = self._span(self.frame)
        return self.frame.mask(start, visible, min(windows, default=None))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        submit_part(keys, values)
        if self.frame is None:
            return super().update_and_fetch(keys, values)  # type: ignore[misc]
        if self.frame.replaying:
            return keys, values
        self.rows = (self.encode(self.frame.together(keys)), self.encode(self.frame.together(values)))
        self._write(self.rows, self.frame.length)
        return self.keys_and_values()

    def _write(self, rows: Any, position: mx.array) -> None:
        """Writes rows into the buffers, from position (B,) on."""
        at = position - self.base
        self.keys, self.values = each(lambda b, r: write_rows(b, r, at), (self.keys, self.values), rows)

    def settle(self) -> None:
        """Writes what an accepted path still has to move."""
        if self.moving is not None:
            self._write(*self.moving)
            self.moving = None

    def keys_and_values(self) -> tuple[Any, Any]:
        """What attention reads; layers that share another's rows ask for it."""
        if self.frame is None:
            return super().keys_and_values()  # type: ignore[misc]
        start, visible = self._span(self.frame)
        first, to_all = start - self.base, self.frame.to_all
        return each(lambda buffer: to_all(buffer[..., first : first + visible, :]), (self.keys, self.values))

    def _span(self, frame: TreeFrame) -> tuple[int, int]:
        """The first position that attention reads, and how many."""
        start = self.base if self.window is None else max(self.base, frame.low - self.window + 1)
        return start, -(-(frame.bound + frame.rows - start) // READ_BLOCK) * READ_BLOCK

    def encode(self, rows: mx.array) -> Any:
        """Rows in the form that the buffers keep them in."""
        return rows

    def map(self, function: Callable[[mx.array], mx.array]) -> None:
        """Replaces every buffer by what the function makes of it."""
        if self.keys is not None:
            self.keys, self.values = each(function, (self.keys, self.values))

    def prepare(self, frame: TreeFrame) -> None:
        """Makes room for a verification, letting go of rows that no window reaches any more."""
        self.settle()
        self.frame = frame
        start, visible = self._span(frame)
        if self.keys is not None:
            self.reserve(start - self.base + visible, drop=start - self.base)

    def reserve(self, rows: int, drop: int = 0) -> None:
        """Grows the buffers to hold at least `rows` rows, in whole blocks; the first `drop` may go for that."""

        def grow(buffer: mx.array) -> mx.array:
            more = -(-(rows - buffer.shape[2]) // BLOCK) * BLOCK
            if more <= 0:
                return buffer
            kept = buffer[:, :, drop:]
            room = mx.zeros((*buffer.shape[:2], max(0, more), buffer.shape[3]), buffer.dtype)
            return mx.concatenate([kept, room], axis=2)

        held = self._capacity()
        self.map(grow)
        if rows > held:
            self.base += drop

    def _capacity(self) -> int:
        return (self.keys if isinstance(self.keys, mx.array) else self.keys[0]).shape[2]

    def begin(self) -> None:
        """The prompt has been read, trees follow."""

    def end(self, length: int) -> None:
        """Back to what mlx-lm's cache is after `length` tokens."""
        self.settle()
        self.rows = None
        self.offset = length

    def move(self, path: mx.array, length: mx.array) -> None:
        """Moves one path's rows together behind the first tree row; path (B, D) without the root."""
        if self.rows is not None:
            self.moving = each(lambda rows: rows_along(rows, path), self.rows), length + 1

    def arrays(self) -> list[mx.array]:
        found: list[mx.array] = []
        if self.keys is not None:
            each(found.append, (self.keys, self.values))
        if self.moving is not None:
            each(found.append, self.moving[0])
        return found


class LayerCache(TreeRows, PlainKVCache):
    """One layer's keys and values as the model makes them."""

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> QuantizedLayerCache:
        self.settle()
        return like(QuantizedLayerCache(group_size, bits), super().to_quantized(group_size, bits))


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

    def begin(self) -> None:
        if self.keys is None:
            return
        rows = min(self._offset, self.max_size)
        self.map(lambda buffer: self._temporal_order(buffer)[:, :, -rows:])
        self.base = self._offset - rows

    def end(self, length: int) -> None:
        super().end(length)
        if self.keys is not None:
            first = max(length - self.max_size, 0) - self.base
            self.map(lambda buffer: buffer[:, :, first : length - self.base])
            self._idx = self.keys.shape[2]
        self.base = 0


def each(function: Callable[..., Any], *buffers: Any) -> Any:
    """The function of every array in buffers of one structure: arrays, or tuples of what is one.

    As mlx's tree_map, which takes a tenth of the time that building a step takes.
    """
    if isinstance(buffers[0], mx.array):
        return function(*buffers)
    return tuple(each(function, *parts) for parts in zip(*buffers))


def like(layer: Any, other: Any) -> Any:
    """`layer` with the contents of another cache of its kind; buffers are shared."""
    layer.keys, layer.values, layer.offset = other.keys, other.values, other.offset
    if isinstance(layer, RotatingKVCache):
        layer._idx = other._idx
    return layer


def write_rows(buffer: mx.array, rows: mx.array, start: mx.array, axis: int = 2) -> mx.array:
    """`buffer` with `rows` written along `axis`, for each b from index start[b] on.

    Args:
        buffer, rows: four axes, the batch first; equal but for `axis`.
        start: (B,) on the device.
    """
    if buffer.shape[0] == 1:
        return mx.slice_update(buffer, rows, start, axes=(axis,))
    for b in range(buffer.shape[0]):
        at = mx.stack([mx.array(b, start.dtype), start[b]])
        buffer = mx.slice_update(buffer, rows[b : b + 1], at, axes=(0, axis))
    return buffer


def rows_along(rows: mx.array, path: mx.array) -> mx.array:
    """(B, heads, D, width) rows of one path, of (B, heads, M, width) of a tree; path (B, D) int32."""
    if rows.shape[0] == 1:
        return mx.take(rows, path[0], axis=2)
    return mx.take_along_axis(rows, path[:, None, :, None], axis=2)


def tree_mask(
    ancestors: mx.array,
    length: mx.array,
    visible: int,
    start: int = 0,
    depths: mx.array | None = None,
    window: int | None = None,
) -> mx.array:
    """What each row of a tree may look at: committed rows, its ancestors, itself, as far as a window reaches.

    Args:
        ancestors: (B, M, M) bool, the diagonal True.
        length: (B,) committed rows; the tree's rows follow them.
        visible: columns of the mask; start + visible is at least length + M.
        start: position of the first column.
        depths: (B, M) distance from the root; needed where there is a window.
        window: a row at position p sees positions above p - window; None for all.

    Returns:
        (B, 1, M, visible) bool.
    """
    batch, rows, _ = ancestors.shape
    columns = mx.arange(start, start + visible, dtype=mx.int32)
    committed = (columns < length[:, None])[:, None, None, :]
    if window is None:
        mask = mx.broadcast_to(committed, (batch, 1, rows, visible))
    else:
        assert depths is not None
        first = length[:, None] + depths - (window - 1)
        mask = committed & (columns >= first[:, None, :, None])
        ancestors = ancestors & (depths[:, :, None] - depths[:, None, :] < window)
    return write_rows(mask, ancestors[:, None], length - start, axis=3)
