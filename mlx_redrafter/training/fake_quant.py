"""The weights as a forward pass sees them: in half precision, or rounded as they will be stored."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map_with_path


def rounded(weight: mx.array, group_size: int, bits: int) -> mx.array:
    """A matrix as affine quantisation would give it back; gradients pass straight through.

    (Straight-through estimator: the rounding counts as the identity, arXiv 1308.3432.)
    """
    back = mx.dequantize(*mx.quantize(weight, group_size=group_size, bits=bits), group_size=group_size, bits=bits)
    return weight + mx.stop_gradient(back - weight)


def as_seen(parameters: Any, dtype: mx.Dtype, quantization: dict[str, int] | None) -> Any:
    """The tree of parameters that a forward pass computes with.

    Args:
        parameters: float32, as the optimiser keeps them.
        dtype: to compute in.
        quantization: {"group_size", "bits"} to train for; None for none.
    """

    def view(name: str, value: mx.array) -> mx.array:
        if quantization is not None and name.endswith(".weight"):
            value = rounded(value, **quantization)
        return value.astype(dtype)

    return tree_map_with_path(view, parameters)
