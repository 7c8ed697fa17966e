"""One update of the weights: the loss and its gradients, clipping, AdamW; compiled where that pays.

Knows nothing of what a batch is made of.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_map_with_path

from mlx_redrafter.system.device import on_cpu

AUTO, ON, OFF = "auto", "on", "off"
WORTH_COMPILING = 500  # updates on a CPU


def optimizer_for(iters: int, peak: float, warm_up: int, weight_decay: float) -> optim.Optimizer:
    """AdamW with a warm-up, and a cosine from the peak down to a hundredth of it."""
    low = peak / 100
    schedule = optim.cosine_decay(peak, max(1, iters - warm_up), low)
    if warm_up:
        schedule = optim.join_schedules([optim.linear_schedule(low, peak, warm_up), schedule], [warm_up])
    return optim.AdamW(learning_rate=schedule, betas=[0.9, 0.95], weight_decay=weight_decay)


def compiled_steps(
    loss_of: Callable[[Any, dict[str, Any]], tuple[mx.array, mx.array]],
    optimizer: optim.Optimizer,
    max_grad_norm: float,
    compile: str,
    iters: int,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two halves of an update: loss, hits and gradients of a batch; weights and the gradient's norm after it.

    Args:
        loss_of: of the weights and the parts of a batch by name; gives the loss and the hits.
        compile: "on", "off" or "auto": on, but for short runs on a CPU, or without the g++ that MLX needs there.
    """
    value_and_grad = mx.value_and_grad(loss_of)

    def gradients_of(weights: Any, parts: dict[str, Any]) -> tuple[mx.array, mx.array, Any]:
        (loss, hits), gradients = value_and_grad(weights, parts)
        return loss, hits, gradients

    def apply(weights: Any, gradients: Any) -> tuple[Any, mx.array]:
        gradients, norm = optim.clip_grad_norm(gradients, max_grad_norm)
        return optimizer.apply_gradients(gradients, weights), norm

    worth_it = not on_cpu() or (iters >= WORTH_COMPILING and shutil.which("g++"))
    if compile == ON or (compile == AUTO and worth_it):
        return mx.compile(gradients_of), mx.compile(apply, inputs=optimizer.state, outputs=optimizer.state)
    return gradients_of, apply


def rounded(weight: mx.array, group_size: int, bits: int) -> mx.array:
    """A matrix as affine quantisation would give it back; gradients pass straight through.

    (Straight-through estimator: the rounding counts as the identity, arXiv 1308.3432.)
    """
    back = mx.dequantize(*mx.quantize(weight, group_size=group_size, bits=bits), group_size=group_size, bits=bits)
    return weight + mx.stop_gradient(back - weight)


def as_seen(parameters: Any, dtype: mx.Dtype, quantization: dict[str, int] | None) -> Any:
    """The weights that a forward pass in `dtype` computes with, rounded for the quantisation that is trained for."""

    def view(name: str, value: mx.array) -> mx.array:
        if quantization is not None and name.endswith(".weight") and value.ndim > 1:  # norms stay whole
            value = rounded(value, **quantization)
        return value.astype(dtype)

    return tree_map_with_path(view, parameters)
