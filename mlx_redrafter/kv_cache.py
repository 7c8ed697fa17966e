"""The KV cache: write a tree's rows behind the committed ones, commit one path, roll back.

To the model it looks like mlx-lm's own cache (`make_mask`, `update_and_fetch`, `offset`,
`state`), and until the first tree is written it is exactly that: the prompt goes through
mlx-lm's code. From then on the committed length is a device array, so that a step can be
built before the one before it has run; the host only knows an upper bound, which sizes the
buffers and the part of them that attention reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache as PlainKVCache

BLOCK = 256  # rows by which buffers grow
READ_BLOCK = 32  # attention reads the bound on the length rounded up to this


@dataclasses.dataclass
class TreeFrame:
    """What all layers share during one verification: where rows go, what they see, where they stand.

    Attributes:
        length: committed rows, (B,) int32, on the device.
        offset: what the model hands to its rope: (B, M) positions, or (B,) where the
            model takes only consecutive ones.
        mask: (B, 1, M, visible) bool; True where a row may look.
        visible: rows of the buffers that attention reads.
    """

    length: mx.array
    offset: mx.array
    mask: mx.array
    visible: int


class LayerCache(PlainKVCache):
    """One layer's keys and values, (B, kv_heads, capacity, head_dim) each."""

    frame: TreeFrame | None = None
    keys: Any  # mx.array once something was written
    values: Any

    # `offset` is a plain attribute in mlx-lm; here it depends on whether a tree is being read.
    @property
    def offset(self) -> Any:
        return self._offset if self.frame is None else self.frame.offset

    @offset.setter
    def offset(self, value: int) -> None:
        self._offset = value

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None):
        if self.frame is None:
            return super().make_mask(N, return_array=return_array, window_size=window_size)
        return self.frame.mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.frame is None:
            return super().update_and_fetch(keys, values)
        self.keys = write_rows(self.keys, keys, self.frame.length)
        self.values = write_rows(self.values, values, self.frame.length)
        return self.keys[..., : self.frame.visible, :], self.values[..., : self.frame.visible, :]

    def reserve(self, rows: int) -> None:
        """Grows the buffers to hold at least `rows` rows, in whole blocks."""
        capacity = self.keys.shape[2]
        if rows <= capacity:
            return
        more = -(-(rows - capacity) // BLOCK) * BLOCK

        def grow(x: mx.array) -> mx.array:
            return mx.concatenate([x, mx.zeros((*x.shape[:2], more, x.shape[3]), x.dtype)], axis=2)

        self.keys, self.values = grow(self.keys), grow(self.values)


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


def move_rows(buffer: mx.array, source: mx.array, target: mx.array) -> mx.array:
    """`buffer` with some of its rows copied together.

    Args:
        buffer: (B, heads, capacity, dim).
        source: (B, 1, D, 1) int32 which rows.
        target: (B,) int32 where the first of them goes; the others follow.
    """
    if buffer.shape[0] == 1:
        rows = mx.take(buffer, source.reshape(-1), axis=2)
    else:
        rows = mx.take_along_axis(buffer, source, axis=2)
    return write_rows(buffer, rows, target)


class KVCache:
    """All layers' caches with one committed length.

    Attributes:
        layers: what the model gets as its `cache` argument.
        length: committed rows, (B,) int32 on the device, once `begin_trees` was called.
        bound: an upper bound of the committed length that the host knows.
    """

    def __init__(self, layers: list[LayerCache]):
        self.layers = layers
        self.length: mx.array | None = None
        self.bound = 0

    @staticmethod
    def takes(prompt_cache: list[Any]) -> bool:
        """Whether these mlx-lm caches are of the kind that trees can be written to."""
        return all(type(cache) in (PlainKVCache, LayerCache) for cache in prompt_cache)

    @classmethod
    def adopt(cls, prompt_cache: list[Any]) -> KVCache:
        """Goes on from what mlx-lm caches hold; their buffers are shared until `give_back`."""
        layers = []
        for cache in prompt_cache:
            layer = LayerCache()
            layer.keys, layer.values, layer.offset = cache.keys, cache.values, cache.offset
            layers.append(layer)
        return cls(layers)

    def give_back(self, prompt_cache: list[Any]) -> None:
        """Leaves the rows in the mlx-lm caches that were adopted."""
        for cache, layer in zip(prompt_cache, self.layers, strict=True):
            cache.keys, cache.values, cache.offset = layer.keys, layer.values, layer.offset

    def begin_trees(self, batch_size: int = 1) -> None:
        """Hands the prompt's length to the device; the prompt's rows must be there."""
        self.bound = int(self.layers[0].offset)
        self.length = mx.full((batch_size,), self.bound, mx.int32)

    @contextlib.contextmanager
    def reading(self, ancestors: mx.array, depths: mx.array, chain: bool) -> Iterator[list[LayerCache]]:
        """While it lasts, the layers take M rows as a tree behind the committed ones.

        Args:
            ancestors: (B, M, M) bool; [b, i, j] is True where row i may look at row j.
            depths: (B, M) int32 distance from the root.
            chain: rows stand in consecutive positions, and the model is told only the first.

        Yields:
            what to call the model with.
        """
        assert self.length is not None
        visible = -(-(self.bound + depths.shape[1]) // READ_BLOCK) * READ_BLOCK
        mask = tree_mask(ancestors, self.length, visible)
        offset = self.length if chain else self.length[:, None] + depths
        frame = TreeFrame(self.length, offset, mask, visible)
        for layer in self.layers:
            layer.reserve(visible)
            layer.frame = frame
        try:
            yield self.layers
        finally:
            for layer in self.layers:
                layer.frame = None

    def commit(self, path: mx.array | None, count: mx.array, most: int) -> None:
        """Keeps the root's row and `count` rows of one path; the length grows by 1 + count.

        Args:
            path: (B, D) tree rows in order, root excluded; None where they already lie in
                order (a chain). Entries beyond `count` are moved too and never looked at.
            count: (B,) accepted draft tokens.
            most: the largest value that count can have.
        """
        assert self.length is not None
        if path is not None:
            source, target = (self.length[:, None] + path)[:, None, :, None], self.length + 1
            for layer in self.layers:
                layer.keys = move_rows(layer.keys, source, target)
                layer.values = move_rows(layer.values, source, target)
        self.length = self.length + 1 + count
        self.bound += 1 + most

    def tighten(self, bound: int) -> None:
        """Tells the host's bound once a step's count has been read."""
        self.bound = bound

    def end_trees(self, length: int) -> None:
        """Back to a plain mlx-lm cache of `length` rows, as after a prompt of that length."""
        for layer in self.layers:
            layer.offset = length
        self.length = None

    def arrays(self) -> list[mx.array]:
        return [x for layer in self.layers for x in (layer.keys, layer.values) if x is not None]


def tree_mask(ancestors: mx.array, length: mx.array, visible: int) -> mx.array:
    """What each row of a tree may look at: all committed rows, its ancestors, itself.

    Args:
        ancestors: (B, M, M) bool, the diagonal True.
        length: (B,) committed rows; the tree's rows follow them.
        visible: columns of the mask, at least length + M.

    Returns:
        (B, 1, M, visible) bool.
    """
    batch, rows, _ = ancestors.shape
    committed = mx.arange(visible, dtype=mx.int32) < length[:, None]
    mask = mx.broadcast_to(committed[:, None, None, :], (batch, 1, rows, visible))
    return write_rows(mask, ancestors[:, None], length, axis=3)
