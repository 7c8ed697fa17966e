"""Windows: what rows see, how much memory stays, and the way back to mlx-lm's rotating cache."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import RotatingKVCache

from mlx_redrafter.target.cache.attention import BLOCK
from mlx_redrafter.target.cache.kv_cache import KVCache
from mlx_redrafter.target.tree import CandidateTree

WINDOW = 6


def rows_of(start, count):
    """(1, 2, count, 3) keys that carry their own position."""
    return mx.broadcast_to(mx.arange(start, start + count, dtype=mx.float32)[None, None, :, None], (1, 2, count, 3)) + 0


def read_prompt(count, chunk=None):
    """mlx-lm's rotating cache after `count` tokens."""
    plain = RotatingKVCache(max_size=WINDOW)
    for start in range(0, count, chunk or count):
        rows = rows_of(start, min(chunk or count, count - start))
        plain.update_and_fetch(rows, rows)
    return plain


def write_chain(cache, length, rows, accepted, ahead=False):
    """One step of a chain; returns the positions that the last row sees.

    Args:
        ahead: the host hears of each step's count only when the next one has been built.
    """
    [layer] = cache.layers
    with cache.reading(CandidateTree.chain(mx.zeros((1, rows), mx.int32)), chain=True):
        keys, _ = layer.update_and_fetch(rows_of(length, rows), rows_of(length, rows))
        mask = layer.make_mask(rows)
    cache.commit(None, mx.array([accepted - 1], mx.int32), rows - 1)
    cache.tighten(length + (rows if ahead else accepted))
    return np.array(keys)[0, 0, np.array(mask)[0, 0, -1], 0].tolist()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("prompt, chunk", [(3, None), (6, None), (15, None), (15, 1), (16, 5)])
def test_rows_see_their_window_before_at_and_far_past_the_wrap(prompt, chunk, ahead):
    """If this fails, a row sees tokens that have left its window, or misses some that have not."""
    cache = KVCache([read_prompt(prompt, chunk)])
    cache.begin_trees()
    length = prompt
    for step in range(150):
        accepted = 1 + step % 4
        seen = write_chain(cache, length, 4, accepted, ahead)
        assert seen == list(range(max(0, length + 3 - WINDOW + 1), length + 4))
        length += accepted


def test_memory_stays_at_the_window_and_some_slack():
    """If this fails, a window's memory grows with the text."""
    cache = KVCache([read_prompt(15)])
    cache.begin_trees()
    length, sizes = 15, set()
    for _ in range(1000):
        write_chain(cache, length, 4, 3)
        length += 3
        sizes.add(cache.layers[0].keys.shape[2])
    assert max(sizes) <= WINDOW + BLOCK + 64


@pytest.mark.parametrize("moved", [0, 2])
@pytest.mark.parametrize("back", range(9))
def test_back_to_a_rotating_cache_at_any_of_the_last_rows(moved, back):
    """If this fails, what mlx-lm goes on with holds other tokens than were given out.

    A loop may be left in the middle of a step's tokens when the next step has been built,
    and that one may have let go of rows: it is left right after rows were moved.
    """
    plain = read_prompt(15)
    cache = KVCache([plain])
    cache.begin_trees()
    length, bases = 15, {cache.layers[0].base}
    while len(bases) <= moved or length < 31:
        write_chain(cache, length, 4, 4, ahead=True)
        length += 4
        bases.add(cache.layers[0].base)
    cache.end_trees(length - back)
    cache.give_back([plain])
    expected = read_prompt(length - back)
    for position in range(length - back, length + 9):
        found, _ = plain.update_and_fetch(rows_of(position, 1), rows_of(position, 1))
        wanted, _ = expected.update_and_fetch(rows_of(position, 1), rows_of(position, 1))
        assert plain.offset == expected.offset
        assert sorted(found[0, 0, :, 0].tolist()) == sorted(wanted[0, 0, :, 0].tolist()[-WINDOW:])
