"""The loss: its value and its gradient."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_redrafter.training.loss import cross_entropy


@pytest.mark.parametrize("dense", [False, True])
def test_cross_entropy_and_its_gradient(dense):
    """If this fails, training walks in a wrong direction."""
    mx.random.seed(0)
    logits = mx.random.normal((5, 50)) * 4
    ids = mx.array(np.stack([np.random.default_rng(i).permutation(50)[:3] for i in range(5)]))
    shares = mx.softmax(mx.random.normal((5, 3)), axis=-1)
    everywhere = mx.put_along_axis(mx.zeros((5, 50)), ids, shares, axis=-1)
    weights = mx.arange(1.0, 6.0)

    def ours(x):
        found = cross_entropy(x, everywhere, None) if dense else cross_entropy(x, shares, ids)
        return mx.sum(weights * found)

    def written_out(x):
        return -mx.sum(weights * mx.sum(everywhere * nn.log_softmax(x), axis=-1))

    assert ours(logits).item() == pytest.approx(written_out(logits).item(), rel=1e-5)
    assert mx.abs(mx.grad(ours)(logits) - mx.grad(written_out)(logits)).max().item() < 1e-5
