"""The KV cache: where rows go, what survives a commit, and the way back to mlx-lm."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache as PlainKVCache
from mlx_lm.models.cache import RotatingKVCache

from mlx_redrafter.target.cache.attention import BLOCK, LayerCache, Path
from mlx_redrafter.target.cache.kv_cache import KVCache, refused
from mlx_redrafter.target.tree import CandidateTree, Places


def rows_of(start, count, batch=1):
    """(batch, 2, count, 3) keys that carry their own number."""
    numbers = mx.arange(start, start + count, dtype=mx.float32)
    return mx.broadcast_to(numbers[None, None, :, None], (batch, 2, count, 3)) + 0


def filled(count, batch=1):
    cache = KVCache([LayerCache(), LayerCache()])
    for layer in cache.layers:
        layer.update_and_fetch(rows_of(0, count, batch), rows_of(100, count, batch))
    cache.begin_trees(batch)
    return cache


def write_tree(cache, start, rows, batch=1):
    with cache.reading(CandidateTree.static(mx.zeros((batch, rows), mx.int32), (0,) * rows), chain=False):
        return [
            layer.update_and_fetch(rows_of(start, rows, batch), rows_of(start + 100, rows, batch))
            for layer in cache.layers
        ]


def numbers(layer, length, b=0):
    layer.flush()
    return layer.keys[b, 1, :length, 2].tolist()


def test_commit_keeps_one_path():
    """If this fails, the target goes on from tokens that were rejected."""
    cache = filled(5)
    write_tree(cache, 50, 6)
    cache.commit(mx.array([[2, 5, 5, 5]], mx.int32), mx.array([2], mx.int32), most=4)
    assert cache.length.tolist() == [8]
    for layer in cache.layers:
        assert numbers(layer, 8) == [0, 1, 2, 3, 4, 50, 52, 55]
        assert layer.values[0, 0, :8, 0].tolist() == [100, 101, 102, 103, 104, 150, 152, 155]


def test_rows_of_a_batch_go_to_their_own_places():
    """If this fails, sequences of different lengths overwrite one another."""
    cache = filled(5, batch=2)
    cache.length = mx.array([5, 3], mx.int32)
    write_tree(cache, 50, 4, batch=2)
    cache.commit(mx.array([[3, 3], [1, 2]], mx.int32), mx.array([1, 2], mx.int32), most=2)
    assert cache.length.tolist() == [7, 6]
    assert numbers(cache.layers[0], 7, b=0) == [0, 1, 2, 3, 4, 50, 53]
    assert numbers(cache.layers[0], 6, b=1) == [0, 1, 2, 50, 51, 52]


def test_a_chain_needs_no_moving():
    cache = filled(5)
    write_tree(cache, 50, 4)
    cache.commit(None, mx.array([2], mx.int32), most=3)
    assert numbers(cache.layers[1], 8) == [0, 1, 2, 3, 4, 50, 51, 52]


def test_grows_by_blocks_and_keeps_what_is_there():
    """If this fails, text is lost each time the cache grows, or it grows by one row at a time."""
    cache = filled(BLOCK - 2)
    for step in range(60):
        write_tree(cache, 1000 + 10 * step, 6)
        cache.commit(mx.array([[1, 2, 3]], mx.int32), mx.array([3], mx.int32), most=3)
    length = int(cache.length.item())
    assert length == BLOCK - 2 + 60 * 4 and cache.bound == length
    layer = cache.layers[0]
    assert layer.keys.shape[2] % BLOCK == 0
    expected = [*range(BLOCK - 2), *(1000 + 10 * s + i for s in range(60) for i in range(4))]
    assert numbers(layer, length) == expected


def test_visible_rows_follow_the_length_and_not_the_capacity():
    """If this fails, attention reads the whole buffer at every step."""
    cache = filled(10)
    cache.layers[0].reserve(4096)
    keys, _ = write_tree(cache, 50, 4)[0]
    assert keys.shape[2] == 32


def test_to_mlx_lm_and_back():
    """If this fails, a prompt cache of mlx-lm's loses rows, or gains rejected ones."""
    plain = [PlainKVCache(), PlainKVCache()]
    for c in plain:
        c.update_and_fetch(rows_of(0, 5), rows_of(100, 5))
    assert not refused([*plain, RotatingKVCache(max_size=8)])
    assert refused([RotatingKVCache(max_size=8, keep=4)])
    cache = KVCache(plain)
    cache.begin_trees()
    write_tree(cache, 50, 6)
    cache.commit(mx.array([[2, 5]], mx.int32), mx.array([2], mx.int32), most=2)
    cache.end_trees(7)
    cache.give_back(plain)
    assert [c.offset for c in plain] == [7, 7]
    keys, _ = plain[0].update_and_fetch(rows_of(70, 1), rows_of(170, 1))
    assert keys[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4, 50, 52, 70]


@pytest.mark.parametrize("batch", [1, 3])
def test_write_and_move(batch):
    buffer = mx.zeros((batch, 2, 12, 3))
    start = mx.arange(batch, dtype=mx.int32)
    out = Places(start + 5).write(buffer, rows_of(1, 4, batch), base=5)
    path = Path(mx.broadcast_to(mx.array([[3]], mx.int32), (batch, 1)), start)
    moved = path.places.write(out, path.rows(rows_of(1, 4, batch)), base=0)
    for b in range(batch):
        assert out[b, 0, :, 0].tolist() == [0] * b + [1, 2, 3, 4] + [0] * (8 - b)
        assert moved[b, 0, :, 0].tolist() == [0] * b + [1, 4, 3, 4] + [0] * (8 - b)


def test_an_accepted_path_is_moved_without_reading_the_buffers():
    """If this fails, MLX copies the whole cache in every step of a tree, for something still reads it."""
    plain = [PlainKVCache()]
    plain[0].update_and_fetch(rows_of(0, 5), rows_of(100, 5))
    cache = KVCache(plain)
    cache.begin_trees()
    write_tree(cache, 50, 6)
    before = cache.layers[0].keys
    cache.commit(mx.array([[2, 5]], mx.int32), mx.array([2], mx.int32), most=2)
    assert cache.layers[0].keys is before
    rows, places = cache.layers[0].pending
    assert rows[0][0, 0, :, 0].tolist() == [52, 55] and places.position.tolist() == [6]
    assert {id(array) for array in rows} <= {id(array) for array in cache.arrays()}
    write_tree(cache, 60, 2)
    assert cache.layers[0].pending is None
    assert cache.layers[0].keys[0, 0, :10, 0].tolist() == [0, 1, 2, 3, 4, 50, 52, 55, 60, 61]
