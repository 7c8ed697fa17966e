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
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import KVCache as PlainKVCache
from mlx_lm.models.cache import QuantizedKVCache

from .errors import UserError

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


class _TreeRows:
    """What turns one of mlx-lm's caches into one that takes trees.

    Keys and values are arrays (B, kv_heads, capacity, width), or tuples of such arrays
    where they are quantised.
    """

    frame: TreeFrame | None = None
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
        return self.frame.mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        if self.frame is None:
            return super().update_and_fetch(keys, values)  # type: ignore[misc]
        length, visible = self.frame.length, self.frame.visible
        rows = (self.encode(keys), self.encode(values))
        self.keys, self.values = tree_map(lambda b, r: write_rows(b, r, length), (self.keys, self.values), rows)
        return tree_map(lambda buffer: buffer[..., :visible, :], (self.keys, self.values))

    def encode(self, rows: mx.array) -> Any:
        """Rows in the form that the buffers keep them in."""
        return rows

    def map(self, function: Callable[[mx.array], mx.array]) -> None:
        """Replaces every buffer by what the function makes of it."""
        self.keys, self.values = tree_map(function, (self.keys, self.values))

    def reserve(self, rows: int) -> None:
        """Grows the buffers to hold at least `rows` rows, in whole blocks."""

        def grow(buffer: mx.array) -> mx.array:
            more = -(-(rows - buffer.shape[2]) // BLOCK) * BLOCK
            if more <= 0:
                return buffer
            room = mx.zeros((*buffer.shape[:2], more, buffer.shape[3]), buffer.dtype)
            return mx.concatenate([buffer, room], axis=2)

        self.map(grow)


class LayerCache(_TreeRows, PlainKVCache):
    """One layer's keys and values as the model makes them."""

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> QuantizedLayerCache:
        return _like(QuantizedLayerCache(group_size, bits), super().to_quantized(group_size, bits))


class QuantizedLayerCache(_TreeRows, QuantizedKVCache):
    """One layer's keys and values in 8 or fewer bits, quantised row by row."""

    def encode(self, rows: mx.array) -> Any:
        return mx.quantize(rows, group_size=self.group_size, bits=self.bits)


def _like(layer: Any, other: Any) -> Any:
    """`layer` with the contents of another cache of its kind; buffers are shared."""
    layer.keys, layer.values, layer.offset = other.keys, other.values, other.offset
    return layer


def quantize_layers(layers: list[Any], start: int, group_size: int, bits: int | None, length: int) -> None:
    """Quantises mlx-lm caches, or ours, in place in their list once they hold `start` rows.

    Args:
        length: rows they hold.
        bits: None does nothing.

    Raises:
        UserError: a head width that the group size does not divide, or a kind of cache
            that mlx-lm cannot quantise.
    """
    if bits is None or length < start:
        return
    for i, layer in enumerate(layers):
        if hasattr(layer, "to_quantized"):
            for width in {layer.keys.shape[-1], layer.values.shape[-1]}:
                if width % group_size:
                    raise UserError(f"--kv-group-size is {group_size}, which does not divide the head width {width}")
            try:
                layers[i] = layer.to_quantized(group_size=group_size, bits=bits)
            except (ValueError, NotImplementedError) as error:
                raise UserError(f"--kv-bits {bits}: mlx-lm cannot quantise {type(layer).__name__} ({error})") from error


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

    def __init__(self, layers: list[LayerCache | QuantizedLayerCache]):
        self.layers = layers
        self.length: mx.array | None = None
        self.bound = 0

    @staticmethod
    def takes(prompt_cache: list[Any]) -> bool:
        """Whether these mlx-lm caches are of the kind that trees can be written to."""
        return all(type(cache) in (PlainKVCache, QuantizedKVCache) for cache in prompt_cache)

    @classmethod
    def adopt(cls, prompt_cache: list[Any]) -> KVCache:
        """Goes on from what mlx-lm caches hold; their buffers are shared until `give_back`."""
        return cls(
            [
                _like(
                    QuantizedLayerCache(cache.group_size, cache.bits) if hasattr(cache, "bits") else LayerCache(), cache
                )
                for cache in prompt_cache
            ]
        )

    def give_back(self, prompt_cache: list[Any]) -> None:
        """Leaves the rows in the list of mlx-lm caches that was adopted; it may get quantised ones."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer, QuantizedLayerCache) and not hasattr(prompt_cache[i], "bits"):
                prompt_cache[i] = QuantizedKVCache(layer.group_size, layer.bits)
            _like(prompt_cache[i], layer)

    def begin_trees(self, batch_size: int = 1) -> None:
        """Hands the prompt's length to the device; the prompt's rows must be there."""
        self.bound = int(self.layers[0].offset)
        self.length = mx.full((batch_size,), self.bound, mx.int32)

    @contextlib.contextmanager
    def reading(self, ancestors: mx.array, depths: mx.array, chain: bool) -> Iterator[list[Any]]:
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
                layer.map(lambda buffer: move_rows(buffer, source, target))
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
        """Every buffer, to submit or to wait for."""
        found: list[mx.array] = []
        tree_map(found.append, [(layer.keys, layer.values) for layer in self.layers if layer.keys is not None])
        return found


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
