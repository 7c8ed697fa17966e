"""Texts of a batch in the KV cache: one joins, some stay, one is taken out.

Knows nothing of what a text is. A text is one entry of the batch axis in every buffer, with
its own committed length; a step may be on its way.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList

from mlx_redrafter.target.cache.attention import LEAST, LayerCache, TreeRows, WindowCache, map_arrays
from mlx_redrafter.target.cache.kv_cache import KVCache, leaves
from mlx_redrafter.target.cache.recurrent import RecurrentCache
from mlx_redrafter.target.tree import Places


def can_pad(cache: KVCache, length: int) -> bool:
    """Whether prompts of up to so many tokens can be read into this cache together, shorter ones padded.

    A state would have read the padding, and a window have lost rows for it.
    """
    return all(
        type(layer) is LayerCache or (isinstance(layer, WindowCache) and length <= layer.max_size)
        for layer in leaves(cache.layers)
    )


def in_small_blocks(cache: KVCache) -> None:
    """Lets prompts take little more room than they have tokens: of many texts each would waste most of a block."""
    for layer in leaves(cache.layers):
        if isinstance(layer, TreeRows):
            layer.step = LEAST


def join(cache: KVCache, other: KVCache) -> None:
    """Takes the texts of another cache of the same model, which is used up, behind those of this one.

    `begin_trees` was called of both. One layer after the other is put together at once, or all of them would be there
    twice.
    """
    assert cache.length is not None and other.length is not None
    cache.bound, cache.low = max(cache.bound, other.bound), min(cache.low, other.low)
    for mine, theirs in zip(leaves(cache.layers), leaves(other.layers), strict=True):
        if isinstance(mine, RecurrentCache):
            mine.cache = [a if a is None else mx.concatenate([a, b]) for a, b in zip(mine.cache, theirs.cache)]
            mine.step = None
        elif mine.keys is not None:
            _join_rows(mine, theirs, cache.bound)
            theirs.keys = theirs.values = None
            mx.eval(mine.arrays())
    cache.length = mx.concatenate([cache.length, other.length])
    cache.steps.clear()


def keep(cache: KVCache, texts: Sequence[int], bound: int | None = None) -> None:
    """Keeps these texts, at least one, in this order.

    One buffer after the other is copied at once, or all of them would be there twice while the next prompt is read.

    Args:
        bound: none of them is longer, nor will be after the steps that are on their way; None where it is not known.
    """
    assert cache.length is not None
    index, places = mx.array(list(texts), mx.int32), dict[int, Places]()
    cache.bound = cache.bound if bound is None else bound

    def kept(array: mx.array) -> mx.array:
        return mx.take(array, index, axis=0)

    for layer in leaves(cache.layers):
        if isinstance(layer, RecurrentCache):
            layer.cache = [None if array is None else kept(array) for array in layer.cache]
            layer.step = None
            continue
        if bound is not None and layer.keys is not None:  # what the longest text had and nobody needs any more
            layer.map(_beginning(layer.room(bound)))
        for name in ("keys", "values") if layer.keys is not None else ():
            setattr(layer, name, map_arrays(kept, getattr(layer, name)))
            mx.eval(getattr(layer, name))
        layer.rows = None
        if layer.pending is not None:
            rows, to = layer.pending
            layer.pending = map_arrays(kept, rows), places.setdefault(id(to), Places(kept(to.position)))
    cache.length = kept(cache.length)
    cache.steps.clear()


def taken_out(cache: KVCache, text: int, length: int) -> KVCache:
    """A cache of one text alone, as after a prompt of `length` tokens; the batch stays as it is.

    Args:
        length: not above what is committed. Of recurrent layers only the last step can be taken
            back, and that only until another text joins or leaves.
    """
    states = [(layer, layer.cache) for layer in leaves(cache.layers) if isinstance(layer, RecurrentCache)]
    cache.take_back(length, text)
    alone = copy.copy(cache)
    alone.layers, alone.steps = [_copied(layer) for layer in cache.layers], collections.deque()
    for layer, state in states:
        layer.cache = state
    keep(alone, [text])
    alone.end_trees(length)
    return alone


def _beginning(rows: int) -> Callable[[mx.array], mx.array]:
    return lambda buffer: buffer[:, :, :rows]


def _join_rows(mine: TreeRows, theirs: TreeRows, bound: int) -> None:
    mine.flush()
    theirs.flush()
    mine.rows = None
    base = min(mine.base, theirs.base)
    room = {layer: layer.room(bound) for layer in (mine, theirs)}
    end = max(layer.base + rows for layer, rows in room.items())

    def joined(a: mx.array, b: mx.array) -> mx.array:
        batch, heads, _, width = a.shape
        both, place = mx.zeros((batch + b.shape[0], heads, end - base, width), a.dtype), 0
        for array, layer in ((a, mine), (b, theirs)):  # written into one buffer: nothing is there in a padded form
            first = layer.base - base
            both[place : place + array.shape[0], :, first : first + room[layer]] = array[:, :, : room[layer]]
            place += array.shape[0]
        return both

    mine.keys, mine.values = map_arrays(joined, (mine.keys, mine.values), (theirs.keys, theirs.values))
    mine.base = base


def _copied(layer: Any) -> Any:
    if isinstance(layer, CacheList):
        return CacheList(*map(_copied, layer.caches))
    return copy.copy(layer)
