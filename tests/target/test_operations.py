"""What a model finds in place of MLX's operations in calls of ours is as good as they are."""

import concurrent.futures

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama

import mlx_redrafter
from mlx_redrafter.system.device import on_cpu
from mlx_redrafter.target import operations
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.operations import (
    FAST_ATTENTION,
    MLX_LM_SWIGLU,
    positions_per_row,
    quick,
    softmax_parts,
    swiglu,
)

OFFSETS = {"number": 7, "first": mx.array([7], mx.int32), "rows": mx.array([[7, 8, 8, 9, 9]], mx.int32)}
OPTIONS = {
    "plain": {"traditional": False, "base": 10000.0, "scale": 1.0},
    "traditional": {"traditional": True, "base": 10000.0, "scale": 1.0},
    "scaled": {"traditional": False, "base": 500.0, "scale": 0.25},
    "frequencies": {"traditional": False, "base": None, "scale": 1.0, "freqs": mx.arange(1, 9).astype(mx.float32) * 3},
}


def one_by_one(a, dims, offset, options):
    """Every row of a (1, heads, rows, width) turned alone."""
    first = offset if isinstance(offset, int) else offset.reshape(-1)[0].item()
    at = [first + i for i in range(a.shape[-2])]
    if isinstance(offset, mx.array) and offset.ndim == 2:
        at = offset[0].tolist()
    turned = [mx.fast.rope(a[..., i : i + 1, :], dims, offset=int(p), **options) for i, p in enumerate(at)]
    return mx.concatenate(turned, axis=-2)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dims", [16, 8], ids=["whole", "part"])
def test_rope_is_that_of_each_row_alone(dims, options, offset, dtype):
    """If this fails, nodes of a tree stand where they do not."""
    if dims == 8 and "freqs" in options:
        options = {**options, "freqs": options["freqs"][:4]}
    if dims == 16 and "freqs" in options:
        options = {**options, "freqs": options["freqs"][:8]}
    a, b = (mx.random.normal((1, heads, 5, 16), key=mx.random.key(heads)).astype(dtype) for heads in (4, 2))
    expected = [one_by_one(x, dims, offset, options) for x in (a, b, a)]
    with positions_per_row():
        found = [mx.fast.rope(x, dims, offset=offset, **options) for x in (a, b, a)]
    tolerance = 2e-6 if dtype == mx.float32 else 0
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert mx.abs(one - other).max().item() <= tolerance


def test_offsets_are_told_apart():
    """If this fails, one layer's positions are used for another's."""
    a = mx.random.normal((1, 2, 5, 16), key=mx.random.key(1))
    options = OPTIONS["plain"]
    other = OFFSETS["rows"] + 3
    expected = one_by_one(a, 16, OFFSETS["rows"], options), one_by_one(a, 16, other, options)
    with positions_per_row():
        found = [mx.fast.rope(a, 16, offset=at, **options) for at in (OFFSETS["rows"], other)]
    assert all(mx.allclose(x, y, atol=2e-6) for x, y in zip(found, expected, strict=True))


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
    monkeypatch.setattr(operations, "_PART", (4, 4))
    mask = MASKS[mask][..., :rows, :] if isinstance(MASKS[mask], mx.array) else MASKS[mask]
    expected = FAST_ATTENTION(*arrays(rows), scale=0.3, mask=mask)
    with positions_per_row():
        found = mx.fast.scaled_dot_product_attention(*arrays(rows), scale=0.3, mask=mask)
    assert np.allclose(found, expected, atol=1e-5)
    assert mx.fast.scaled_dot_product_attention is FAST_ATTENTION


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
    assert mx.array_equal(found, FAST_ATTENTION(*halves, scale=0.3))


def test_swiglu():
    """If this fails, feed-forward layers compute something else where rows are few."""
    gate = mx.concatenate([mx.linspace(-100, 100, 20001), mx.array([0.0, -1e5, 1e5])])
    up = mx.full(gate.shape, 1e4)  # what comes beside the gate may be large
    with np.errstate(over="ignore"):
        exact = np.array(gate, np.float64) / (1 + np.exp(-np.array(gate, np.float64))) * 1e4
    assert np.allclose(operations._swiglu(gate, up), exact, rtol=3e-6, atol=1e-28)


def test_softmax():
    """If this fails, attention weighs keys wrongly, or what is hidden is seen."""
    scores = 9 * mx.random.normal((3, 5, 700), key=mx.random.key(1))
    scores = mx.where(mx.random.uniform(shape=(700,), key=mx.random.key(2)) < 0.3, mx.finfo(mx.float32).min, scores)
    numerators, total = softmax_parts(scores)
    exact = np.exp(np.array(scores, np.float64) - np.array(scores.max(axis=-1, keepdims=True), np.float64))
    assert np.allclose(numerators / total, exact / exact.sum(-1, keepdims=True), rtol=1e-5, atol=1e-37)


def test_softmax_learns():
    """If this fails, heads that read their own rows cannot be trained on a CPU."""
    scores, values = mx.random.normal((2, 3, 5)), mx.random.normal((2, 3, 5))

    def ours(scores):
        numerators, total = softmax_parts(scores)
        return (numerators / total * values).sum()

    exact = mx.grad(lambda scores: (mx.softmax(scores, axis=-1) * values).sum())(scores)
    assert mx.allclose(mx.grad(ours)(scores), exact, atol=1e-6)


def test_swiglu_learns():
    """If this fails, heads with feed-forward layers cannot be trained on a CPU."""
    both = mx.random.normal((3, 7)), mx.random.normal((3, 7))
    found, exact = (
        mx.grad(lambda *x, f=f: mx.square(f(*x)).sum(), argnums=(0, 1))(*both)
        for f in (operations._swiglu, MLX_LM_SWIGLU)
    )
    assert all(mx.allclose(a, b, atol=1e-5) for a, b in zip(found, exact, strict=True))


@pytest.mark.skipif(not on_cpu(), reason="a GPU computes exponentials itself")
def test_only_in_calls_of_ours(monkeypatch):
    """If this fails, mlx-lm's own loop, with which ours is compared, is another one."""
    model, _, _ = mlx_redrafter.load("embedded")
    asked = []
    monkeypatch.setattr(operations, "quick", lambda *args: asked.append(args) or quick(*args))
    Target.of(model)
    assert llama.swiglu is swiglu
    mx.eval(model(mx.array([[1, 2, 3]])))
    assert not asked
    with positions_per_row():
        mx.eval(model(mx.array([[1, 2, 3]])))
    assert asked
    asked.clear()
    with positions_per_row(), concurrent.futures.ThreadPoolExecutor(1) as other:  # a loop of mlx-lm's beside ours
        rows = mx.ones((1, 2, 8, 600))
        other.submit(lambda: mx.fast.scaled_dot_product_attention(rows, rows, rows, scale=1.0)).result()
        other.submit(swiglu, mx.ones((2, 800)), mx.ones((2, 800))).result()
    assert not asked
    half = mx.ones((64, 64), mx.float16)
    with positions_per_row():
        assert mx.array_equal(swiglu(half, half), MLX_LM_SWIGLU(half, half))
