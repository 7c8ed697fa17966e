"""Weights laid out for OpenBLAS, so that a few rows cost little more than one.

OpenBLAS copies ("packs") a whole weight matrix before it multiplies it with several rows;
with few rows that copy takes longer than the product. Below about 10^6 multiplications it
multiplies in place instead. So a matrix is kept as panels of 64 or 32 columns, each a
product of its own below that limit: packed once, when the model is loaded.

Metal, CUDA and Accelerate need none of this, and half-precision or quantised products on
the CPU do not use OpenBLAS: nothing is changed there.
"""

from __future__ import annotations

import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .blas import openblas_is_loaded

_LIMIT = 1_000_000  # multiplications of a product that OpenBLAS does in place
_ROWS = 24  # rows up to which panels stay below the limit
_WIDTHS = (64, 32)
_SAMPLE = (384, 1024)  # the matrix on which both layouts are timed


class PackedLinear(nn.Linear):
    """A linear layer of the same numbers, its weight kept as panels.

    Attributes:
        panels: (N / b, K, b) for a weight of shape (N, K); column j of panel i is row i b + j.
    """

    def __init__(self, layer: nn.Linear, width: int):
        nn.Module.__init__(self)
        self.panels = to_panels(layer.weight, width)
        if "bias" in layer:
            self.bias = layer.bias

    @property
    def weight(self) -> mx.array:
        """The weight (N, K), put together anew at each use."""
        return from_panels(self.panels)

    def __call__(self, x: mx.array) -> mx.array:
        product = multiply(x, self.panels)
        return product + self.bias if "bias" in self else product


class PackedEmbedding(nn.Embedding):
    """An embedding whose matrix, an output layer too, is kept as panels."""

    def __init__(self, layer: nn.Embedding, width: int):
        nn.Module.__init__(self)
        self.panels = to_panels(layer.weight, width)

    @property
    def weight(self) -> mx.array:
        """The matrix (vocabulary, width), put together anew at each use."""
        return from_panels(self.panels)

    def __call__(self, x: mx.array) -> mx.array:
        width = self.panels.shape[-1]
        return self.panels[x // width, :, x % width]

    def as_linear(self, x: mx.array) -> mx.array:
        return multiply(x, self.panels)


def pack(model: nn.Module) -> nn.Module:
    """Replaces the layers of a model for which panels are faster here, in place; returns the model."""
    if not panels_are_faster():
        return model
    for module in model.modules():
        for name, child in module.children().items():
            if isinstance(child, list):
                for i, each in enumerate(child):
                    if (packed := _packed(each)) is not None:
                        child[i] = packed
            elif (packed := _packed(child)) is not None:
                module[name] = packed
    return model


def multiply(x: mx.array, panels: mx.array) -> mx.array:
    """x W^T of shape (..., N), for x (..., K) and the panels of W."""
    count, depth, width = panels.shape
    rows = x.size // depth
    if rows * width * depth > _LIMIT:
        return x @ from_panels(panels).T
    product = mx.matmul(x.reshape(1, rows, depth), panels)
    return product.swapaxes(0, 1).reshape(*x.shape[:-1], count * width)


def to_panels(weight: mx.array, width: int) -> mx.array:
    """(N, K) -> (N / width, K, width), computed at once so that the matrix can be freed."""
    rows, depth = weight.shape
    panels = mx.contiguous(weight.reshape(rows // width, width, depth).swapaxes(1, 2))
    mx.eval(panels)
    return panels


def from_panels(panels: mx.array) -> mx.array:
    """The inverse of `to_panels`."""
    return panels.swapaxes(1, 2).reshape(-1, panels.shape[1])


def panel_width(weight: mx.array) -> int | None:
    """Columns of a panel for a weight (N, K); None where it is better left alone."""
    rows, depth = weight.shape
    if weight.dtype != mx.float32:
        return None
    return next((w for w in _WIDTHS if rows % w == 0 and _ROWS * w * depth <= _LIMIT), None)


def _packed(layer: Any) -> nn.Module | None:
    kinds: dict[type, Any] = {nn.Linear: PackedLinear, nn.Embedding: PackedEmbedding}
    if (kind := kinds.get(type(layer))) is None or (width := panel_width(layer.weight)) is None:
        return None
    return kind(layer, width)  # type: ignore[no-any-return]


_faster: bool | None = None


def panels_are_faster() -> bool:
    """Whether panels beat the usual layout on this processor, timed once per process in some 10 ms."""
    global _faster
    if _faster is None:
        _faster = openblas_is_loaded() and mx.default_device() == mx.cpu and _compare()
    return _faster


def _compare() -> bool:
    weight = mx.random.normal(_SAMPLE[::-1], key=mx.random.key(0))
    x = mx.random.normal((4, _SAMPLE[0]), key=mx.random.key(1))
    panels = to_panels(weight, _WIDTHS[0])
    mx.eval(x, weight)
    times = [_best(lambda: multiply(x, panels)), _best(lambda: x @ weight.T)]
    return times[0] < 0.8 * times[1]


def _best(work: Any) -> float:
    times = []
    for _ in range(8):
        begun = time.perf_counter()
        mx.eval([work() for _ in range(4)])
        times.append(time.perf_counter() - begun)
    return min(times)
