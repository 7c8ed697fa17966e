"""Makes a target cost more and write the same: it widens feed-forward layers by neurons that contribute nothing.

Knows nothing of what is measured with it.

Every feed-forward layer gets more neurons. Their rows in `gate_proj` and `up_proj` are
random numbers as large as the real ones, so all the work is done; their columns in
`down_proj` are zero, so the sum stays what it was but for rounding. Text and acceptance are
then those of the small model while a step costs what one of a larger model costs: a stand-in
for a machine that has no large weights, not a model of its own.

The scale counts bytes of weights that plain decoding reads per token, which is what a step
is bound by on every memory-bound device, and which is the same on all of them; the time may
grow by less (attention, the head and the caches stay as they were).
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.weights import weights

NAMES = ("gate_proj", "up_proj", "down_proj")
MULTIPLE = 64  # widths stay multiples of this, as real ones are


def scale_cost(model: nn.Module, scale: float) -> float:
    """Widens a Llama-like model in place.

    Args:
        model: with feed-forward layers of three unquantised matrices named as in Llama.
        scale: bytes of weights read per token, relative to now; 1 leaves it as it is.

    Returns:
        the scale that was reached: widths are whole multiples of 64 neurons.

    Raises:
        UserError: a scale below 1, or a model of another kind.
    """
    if not 1 <= scale <= 1000:
        raise UserError(f"--cost-scale is {scale}, expected 1 to 1000")
    layers: list[Any] = [m for m in model.modules() if all(isinstance(m.children().get(n), nn.Linear) for n in NAMES)]
    if scale == 1:
        return 1.0
    if not layers:
        raise UserError("--cost-scale: the target has no feed-forward layers of gate_proj, up_proj and down_proj")
    before = bytes_per_token(model)
    per_neuron = sum(getattr(layer, name).weight.nbytes for layer in layers for name in NAMES)
    per_neuron //= layers[0].gate_proj.weight.shape[0]
    extra = max(1, round((scale - 1) * before / per_neuron / MULTIPLE)) * MULTIPLE
    key = mx.random.key(0)
    for layer in layers:
        for name in NAMES[:2]:
            key, use = mx.random.split(key)
            _add_outputs(getattr(layer, name), extra, use)
        down = layer.down_proj
        down.weight = mx.concatenate([down.weight, mx.zeros((down.weight.shape[0], extra), down.weight.dtype)], axis=1)
        mx.eval(layer.parameters())  # layer by layer, so that old and new weights never lie side by side
    mx.clear_cache()
    return bytes_per_token(model) / before


def bytes_per_token(model: nn.Module) -> int:
    """Bytes of weights that one plain step reads: all of them, but of an embedding that is not also the head."""
    _, total = weights(model)
    embeddings = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding))]
    tied = not any("lm_head" in name for name, _ in model.named_modules())
    return total if tied else total - sum(weights(m)[1] for m in embeddings)


def _add_outputs(linear: Any, count: int, key: mx.array) -> None:
    """More outputs, with random weights of the size that the others have."""
    weight = linear.weight
    size = mx.sqrt(mx.mean(mx.square(weight.astype(mx.float32))))
    bound = math.sqrt(3)  # of uniform numbers whose mean square is 1
    rows = (mx.random.uniform(-bound, bound, (count, weight.shape[1]), key=key) * size).astype(weight.dtype)
    linear.weight = mx.concatenate([weight, rows], axis=0)
    if "bias" in linear:
        linear.bias = mx.concatenate([linear.bias, mx.zeros((count,), linear.bias.dtype)])
