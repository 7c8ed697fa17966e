"""Exponentials as polynomials are as good as MLX's."""

import concurrent.futures

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama

import mlx_redrafter
from mlx_redrafter.system.device import on_cpu
from mlx_redrafter.target import exponentials
from mlx_redrafter.target.exponentials import MLXS, quick, softmax_parts, swiglu
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.rope import positions_per_row


def test_swiglu():
    """If this fails, feed-forward layers compute something else where rows are few."""
    gate = mx.concatenate([mx.linspace(-100, 100, 20001), mx.array([0.0, -1e5, 1e5])])
    up = mx.full(gate.shape, 1e4)  # what comes beside the gate may be large
    with np.errstate(over="ignore"):
        exact = np.array(gate, np.float64) / (1 + np.exp(-np.array(gate, np.float64))) * 1e4
    assert np.allclose(exponentials._swiglu(gate, up), exact, rtol=3e-6, atol=1e-28)


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
        mx.grad(lambda *x, f=f: mx.square(f(*x)).sum(), argnums=(0, 1))(*both) for f in (exponentials._swiglu, MLXS)
    )
    assert all(mx.allclose(a, b, atol=1e-5) for a, b in zip(found, exact, strict=True))


@pytest.mark.skipif(not on_cpu(), reason="a GPU computes exponentials itself")
def test_only_in_calls_of_ours(monkeypatch):
    """If this fails, mlx-lm's own loop, with which ours is compared, is another one."""
    model, _, _ = mlx_redrafter.load("embedded")
    asked = []
    monkeypatch.setattr(exponentials, "quick", lambda *args: asked.append(args) or quick(*args))
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
        assert mx.array_equal(swiglu(half, half), MLXS(half, half))
