"""Texts of a batch in the KV cache: one joins, some stay, one is taken out.

Knows nothing of what a text is. A text is one entry of the batch axis in every buffer, with
its own committed length; all of this only builds graphs, so a step may be on its way.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import CacheList

from mlx_redrafter.target.cache.attention import LayerCache, TreeRows, WindowCache
from mlx_redrafter.target.cache.frame import map_arrays
from mlx_redrafter.target.cache.kv_cache import KVCache, leaves
from mlx_redrafter.target.cache.recurrent import RecurrentCache


def can_pad(cache: KVCache, length: int) -> bool:
    """Whether prompts of up to so many tokens can be read into this cache together, shorter ones padded.

    A state would have read the padding, and a window have lost rows for it.
    """
    return all(
        type(layer) is LayerCache or (isinstance(layer, WindowCache) and length <= layer.max_size)
        for layer in leaves(cache.layers)
    )


def join(cache: KVCache, other: KVCache) -> None:
    """Takes the texts of another cache of the same model behind those of this one; `begin_trees` was called of both."""
    assert cache.length is not None and other.length is not None
    for mine, theirs in zip(leaves(cache.layers), leaves(other.layers), strict=True):
        if isinstance(mine, RecurrentCache):
            mine.cache = [a if a is None else mx.concatenate([a, b]) for a, b in zip(mine.cache, theirs.cache)]
            mine.step = None
        elif mine.keys is not None:
            _join_rows(mine, theirs)
    cache.length = mx.concatenate([cache.length, other.length])
    cache.bound, cache.low = max(cache.bound, other.bound), min(cache.low, other.low)
    cache.steps.clear()


def keep(cache: KVCache, texts: Sequence[int]) -> None:
    """Keeps these texts, at least one, in this order."""
    assert cache.length is not None
    index = mx.array(list(texts), mx.int32)

    def kept(array: mx.array) -> mx.array:
        return mx.take(array, index, axis=0)

    for layer in leaves(cache.layers):
        if isinstance(layer, RecurrentCache):
            layer.cache = [None if array is None else kept(array) for array in layer.cache]
            layer.step = None
            continue
        layer.map(kept)
        layer.rows = None
        if layer.pending is not None:
            layer.pending = map_arrays(kept, layer.pending[0]), kept(layer.pending[1])
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


def _join_rows(mine: TreeRows, theirs: TreeRows) -> None:
    mine.flush()
    theirs.flush()
    mine.rows = None
    capacity = [
        (layer.keys if isinstance(layer.keys, mx.array) else layer.keys[0]).shape[2] for layer in (mine, theirs)
    ]
    base = min(mine.base, theirs.base)
    end = max(mine.base + capacity[0], theirs.base + capacity[1])

    def joined(a: mx.array, b: mx.array) -> mx.array:
        parts = []
        for array, layer in ((a, mine), (b, theirs)):
            before = layer.base - base
            parts.append(mx.pad(array, [(0, 0), (0, 0), (before, end - base - before - array.shape[2]), (0, 0)]))
        return mx.concatenate(parts)

    mine.keys, mine.values = map_arrays(joined, (mine.keys, mine.values), (theirs.keys, theirs.values))
    mine.base = base


def _copied(layer: Any) -> Any:
    if isinstance(layer, CacheList):
        return CacheList(*map(_copied, layer.caches))
    return copy.copy(layer)
