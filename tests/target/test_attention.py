"""Attention in parts is MLX's own, whatever mask comes."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_redrafter.target import attention
from mlx_redrafter.target.attention import MLXS
from mlx_redrafter.target.rope import positions_per_row

BATCH, HEADS, SHARED, ROWS, COLUMNS = 2, 6, 2, 21, 30

MASKS = {
    "none": None,
    "causal": "causal",
    "bool": mx.random.uniform(shape=(BATCH, 1, ROWS, COLUMNS), key=mx.random.key(4)) < 0.6,
    "of all": mx.random.uniform(shape=(ROWS, COLUMNS), key=mx.random.key(5)) < 0.6,
    "of every head": mx.random.normal((1, HEADS, ROWS, COLUMNS), key=mx.random.key(6)),
    "nothing seen": mx.zeros((1, 1, ROWS, COLUMNS), mx.bool_),
}


def arrays(rows=ROWS):
    shapes = (BATCH, HEADS, rows, 8), (BATCH, SHARED, COLUMNS, 8), (BATCH, SHARED, COLUMNS, 5)
    return [mx.random.normal(shape, key=mx.random.key(n)) for n, shape in enumerate(shapes)]


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("mask", MASKS)
def test_in_parts(mask, rows, monkeypatch):
    """If this fails, a row looks at what it may not look at, or heads look at keys of others."""
    monkeypatch.setattr(attention, "_ROWS", (4, 4))
    mask = MASKS[mask][..., :rows, :] if isinstance(MASKS[mask], mx.array) else MASKS[mask]
    expected = MLXS(*arrays(rows), scale=0.3, mask=mask)
    with positions_per_row():
        found = mx.fast.scaled_dot_product_attention(*arrays(rows), scale=0.3, mask=mask)
    assert np.allclose(found, expected, atol=1e-5)
    assert mx.fast.scaled_dot_product_attention is MLXS


def test_a_prompt_never_has_all_its_scores_at_once():
    """If this fails, reading a long prompt on a CPU takes memory that grows with its square."""
    rows = 1500
    queries, keys = (mx.random.normal((1, 4, rows, 8)) for _ in range(2))
    mx.eval(queries, keys)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with positions_per_row():
        mx.eval(mx.fast.scaled_dot_product_attention(queries, keys, keys, scale=1.0, mask="causal"))
    assert mx.get_peak_memory() - before < 4 * rows * rows * 4 / 2


def test_half_precision_stays_mlxs():
    """If this fails, what is rounded once is rounded more often."""
    halves = [array.astype(mx.float16) for array in arrays()]
    with positions_per_row():
        found = mx.fast.scaled_dot_product_attention(*halves, scale=0.3)
    assert mx.array_equal(found, MLXS(*halves, scale=0.3))
