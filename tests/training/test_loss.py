"""The loss: its value and its gradient."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_redrafter.training.loss import acceptance_loss, cross_entropy


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


@pytest.mark.parametrize("dense", [False, True])
def test_the_acceptance_loss_and_its_gradient(dense):
    """If this fails, `--loss lk` does not learn what is accepted."""
    mx.random.seed(1)
    logits = mx.random.normal((4, 30)) * 2
    ids = mx.array(np.stack([np.random.default_rng(i).permutation(30)[:5] for i in range(4)]))
    shares = mx.softmax(mx.random.normal((4, 5)), axis=-1)
    everywhere = mx.put_along_axis(mx.zeros((4, 30)), ids, shares, axis=-1)
    logits[3] = mx.log(everywhere[3] + 1e-9)  # the same distribution: all of it is accepted
    labels = (everywhere, None) if dense else (shares, ids)

    def ours(x):
        return acceptance_loss(cross_entropy(x, *labels), x, *labels)

    def written_out(x):
        probabilities = mx.softmax(x, axis=-1)
        overlap = mx.sum(mx.minimum(everywhere, probabilities), axis=-1)
        mix = mx.stop_gradient(mx.exp(-3 * overlap))
        return -mix * mx.sum(everywhere * mx.log(probabilities), axis=-1) + (1 - mix) * (1 - overlap)

    assert mx.allclose(ours(logits), written_out(logits), rtol=1e-5)
    found, expected = (mx.grad(lambda x, f=f: mx.sum(f(x)))(logits) for f in (ours, written_out))
    assert mx.abs(found - expected)[:3].max().item() < 1e-5
