"""The target's output layer, whole or some of its rows, for drafters that start from it or share it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.openblas_layout import PackedEmbedding, PackedLinear, packed
from mlx_redrafter.target.model import Target

_SAMPLE = 8  # positions on which a layer that was found is compared with the model's own logits


def output_layer(target: Target, ids: mx.array | None = None) -> nn.Module:
    """A layer that turns the hidden state into the target's logits, up to a factor and a soft-cap.

    Args:
        target: one that gives hidden states.
        ids: (n,) the rows wanted, in this order; None for all.

    Returns:
        (..., hidden_size) -> (..., n or vocab_size), frozen. A whole layer shares the target's
        weights; rows are copied, quantised ones as they are.

    Raises:
        UserError: no layer of the model gives its logits.
    """
    found = _find(target)
    if ids is None and isinstance(found, (PackedLinear, PackedEmbedding)):
        shared = PackedLinear(found, found.panels)
        shared.freeze()
        return shared
    parts, quantization = _parts(found)
    if ids is not None:
        parts = {name: value[ids] for name, value in parts.items()}
        mx.eval(parts)
    layer: nn.Module
    if quantization is None:
        layer = nn.Linear(1, 1, bias="bias" in parts)
    else:
        layer = nn.QuantizedLinear(quantization["group_size"], 1, bias="bias" in parts, **quantization)
    layer.update(parts)
    layer = packed(layer) if isinstance(found, (PackedLinear, PackedEmbedding)) else layer
    layer.freeze()
    return layer


def output_matrix(target: Target) -> np.ndarray:
    """The whole layer as (vocab_size, hidden_size) float32, without a bias."""
    return np.array(rows_of(_find(target)).astype(mx.float32))


def rows_of(layer: nn.Module, ids: mx.array | None = None) -> mx.array:
    """A layer's rows (n, hidden_size), dequantised, without a bias; all of them if no ids (n,) are given."""
    parts, quantization = _parts(layer)
    parts = {name: part if ids is None else part[ids] for name, part in parts.items()}
    if quantization is None:
        return parts["weight"]
    return mx.dequantize(parts["weight"], parts["scales"], parts.get("biases"), **quantization)


def _find(target: Target) -> nn.Module:
    """The module of a model that gives its logits.

    A model names its output layer as it likes. So every matrix with a row per token is
    tried, and the one whose products are the model's logits is it: equal to them up to a
    factor, or in the same order where the model caps them.
    """
    tokens = (mx.arange(_SAMPLE, dtype=mx.int32)[None] * 7 + 3) % target.vocab_size
    hidden, logits = target.forward(tokens, [None] * len(target.model.layers))
    if hidden is not None:
        for module in target.model.modules():
            if not isinstance(module, (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)):
                continue
            if module.weight.shape[0] != logits.shape[-1]:
                continue
            as_layer: Any = module.as_linear if hasattr(module, "as_linear") else module
            try:
                found = as_layer(hidden)
            except ValueError:  # rows of another width
                continue
            if _same_order(found, logits):
                return module
    raise UserError("the target's output layer was not found: no matrix of the model gives its logits")


def _parts(layer: Any) -> tuple[dict[str, mx.array], dict[str, Any] | None]:
    """The tensors of a layer and, where it is quantised, how."""
    names = ("weight", "scales", "biases", "bias")
    parts = {name: part for name in names if (part := getattr(layer, name, None)) is not None}
    if "scales" not in parts:
        return parts, None
    return parts, {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}


def _same_order(found: mx.array, expected: mx.array) -> bool:
    """Whether both rank tokens alike, as well as rounding lets one say: their correlation is 1 or nearly."""
    x, y = (np.array(part[0].astype(mx.float32)).astype(np.float64) for part in (found, expected))
    x, y = (part - part.mean(axis=-1, keepdims=True) for part in (x, y))
    scale = np.sqrt((x * x).sum() * (y * y).sum())
    return bool(scale > 0 and (x * y).sum() / scale > 0.98)
