"""Texts of a batch in the KV cache: what they take, and what they leave behind."""

import mlx.core as mx

from mlx_redrafter.target.cache import rows
from mlx_redrafter.target.cache.attention import LEAST, LayerCache
from mlx_redrafter.target.cache.kv_cache import KVCache

LAYERS, TEXTS = 8, 4


def filled():
    """A cache of several texts, and bytes of all its buffers."""
    cache = KVCache([LayerCache() for _ in range(LAYERS)])
    for layer in cache.layers:
        layer.update_and_fetch(mx.ones((TEXTS, 2, 200, 64)), mx.ones((TEXTS, 2, 200, 64)))
    cache.begin_trees(TEXTS)
    mx.eval(cache.arrays())
    return cache, sum(array.nbytes for array in cache.arrays())


def test_who_leaves_takes_the_memory_along():
    """If this fails, texts that have left lie beside the next prompt, or what stays is there twice."""
    mx.synchronize()
    before = mx.get_active_memory()
    cache, full = filled()
    mx.reset_peak_memory()
    rows.keep(cache, [2])
    mx.synchronize()
    assert mx.get_active_memory() - before < 1.1 * full / TEXTS
    assert mx.get_peak_memory() - before < full * (1 + 0.5 / LAYERS)
    assert cache.layers[0].keys.shape[0] == 1


def test_prompts_take_small_blocks():
    """If this fails, many short prompts take several times the room that they need."""
    cache = KVCache([LayerCache()])
    rows.in_small_blocks(cache)
    cache.layers[0].update_and_fetch(mx.ones((1, 2, 20, 64)), mx.ones((1, 2, 20, 64)))
    assert cache.layers[0].keys.shape[2] == LEAST
