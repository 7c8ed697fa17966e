"""Weights as a forward pass sees them."""

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.training.update import rounded


def test_rounding_for_quantisation_passes_gradients():
    """If this fails, training for 4 bits learns nothing, or trains for other weights than are stored."""
    mx.random.seed(0)
    weight, x = mx.random.normal((8, 64)), mx.random.normal((64,))
    quantised = nn.QuantizedLinear.from_linear(_linear(weight), 32, 4)
    assert mx.abs(rounded(weight, 32, 4) @ x - quantised(x)).max().item() < 1e-4
    gradient = mx.grad(lambda w: mx.sum(rounded(w, 32, 4) @ x))(weight)
    assert mx.allclose(gradient, mx.broadcast_to(x, (8, 64)))


def _linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = weight
    return layer
