"""Lays weights out for OpenBLAS, so that a few rows cost little more than one.

Knows nothing of what a model does with its layers. OpenBLAS copies ("packs") a whole weight
matrix before it multiplies it with several rows; with few rows that copy takes longer than
the product. Below 10^6 multiplications it multiplies in place instead. So a matrix is kept
as panels of 64 or 32 columns and limited depth, each a product of its own below that limit:
packed once, when the model is loaded.

Metal, CUDA and Accelerate need none of this, and half-precision or quantised products on
the CPU do not use OpenBLAS: nothing is changed there.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.system.device import on_cpu
from mlx_redrafter.system.module_slots import slots
from mlx_redrafter.system.openblas import openblas_is_loaded

_LIMIT = 1_000_000  # multiplications of a product that OpenBLAS does in place
_ROWS = 24  # rows up to which the products of single panels stay below it
_WIDTHS = (64, 32)  # columns of a panel, the better ones first
_SHALLOW = 256  # panels of fewer rows than this cost more than they save
_SAMPLE = (1024, 384)  # the matrix on which both layouts are timed
_WORTH_IT = 0.8  # share of the usual layout's time from which on panels are used


class _Packed(nn.Module):
    """A layer of the same numbers as a plain one, which keeps its weight as panels.

    To everybody else it has a `weight` like any layer of mlx: it is saved, counted, frozen,
    quantised and adapted by it. The weight is put together anew at each use, so nobody who
    does not ask for it pays for it. Whoever gives it another weight, as loading and training
    do, makes it the plain layer again.

    Attributes:
        panels: (N / b, K, b) for a weight of shape (N, K), or (c, N / b, K / c, b) where it is
            cut into c pieces along K as well; column j of panel i is row i b + j.
    """

    plain: type[nn.Module]
    panels: mx.array

    def __init__(self, layer: nn.Module, panels: mx.array):
        nn.Module.__init__(self)
        object.__setattr__(self, "panels", panels)
        self._no_grad |= layer._no_grad
        self.train(layer.training)
        if "bias" in layer:
            self.bias = layer.bias

    @property
    def weight(self) -> mx.array:
        """The weight (N, K), put together anew at each use."""
        return from_panels(self.panels)

    def items(self) -> Any:
        return {"weight": self.weight, **dict(super().items())}.items()

    def __contains__(self, key: object) -> bool:
        return key == "weight" or super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        return self.weight if key == "weight" else super().__getitem__(key)

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "weight":
            self[key] = value
        else:
            super().__setattr__(key, value)

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "weight":
            object.__setattr__(self, "__class__", self.plain)
            object.__delattr__(self, "panels")
        nn.Module.__setitem__(self, key, value)


class PackedLinear(_Packed, nn.Linear):  # type: ignore[override]
    """A linear layer."""

    plain = nn.Linear

    def __call__(self, x: mx.array) -> mx.array:
        product = multiply(x, self.panels)
        return product + self.bias if "bias" in self else product


class PackedEmbedding(_Packed, nn.Embedding):  # type: ignore[override]
    """An embedding whose matrix is an output layer too."""

    plain = nn.Embedding

    def __call__(self, x: mx.array) -> mx.array:
        width = self.panels.shape[-1]
        if self.panels.ndim == 3:
            return self.panels[x // width, :, x % width]
        found = self.panels[:, x // width, :, x % width]  # (*x.shape, c, K / c)
        return found.reshape(*x.shape, -1)

    def as_linear(self, x: mx.array) -> mx.array:
        return multiply(x, self.panels)


def pack(model: nn.Module) -> nn.Module:
    """Replaces the layers of a model for which panels are faster here, in place; returns the model.

    Only plain nn.Linear and nn.Embedding in float32 are, and only their layout changes: what
    has a `weight` still does, its products differ by rounding alone.
    """
    if not panels_are_faster():
        return model
    for slot in list(slots(model)):
        if (layer := packed(slot.module)) is not slot.module:
            slot.owner[slot.name] = layer
    return model


def packed(layer: Any) -> Any:
    """A layer with its weight as panels; the layer itself where it is better left alone."""
    kinds: dict[type, Any] = {nn.Linear: PackedLinear, nn.Embedding: PackedEmbedding}
    if (kind := kinds.get(type(layer))) is None or (shape := panel_shape(layer.weight)) is None:
        return layer
    return kind(layer, to_panels(layer.weight, *shape))


def multiply(x: mx.array, panels: mx.array) -> mx.array:
    """x W^T of shape (..., N), for x (..., K) and the panels of W."""
    count, depth, width = panels.shape[-3:]
    lead, rows = x.shape[:-1], x.size // x.shape[-1]
    if panels.ndim == 3:
        product = mx.matmul(x if x.ndim == 3 and lead[0] == 1 else x.reshape(1, rows, depth), panels)
    else:
        pieces = x.reshape(rows, -1, 1, depth).transpose(1, 2, 0, 3)
        product = mx.sum(mx.matmul(pieces, panels), axis=0)
    if rows > 1:
        product = product.swapaxes(0, 1)
    return product.reshape(*lead, count * width)


def to_panels(weight: mx.array, width: int, pieces: int = 1) -> mx.array:
    """The panels of a weight (N, K), computed at once so that the matrix can be freed.

    Args:
        width: b, a divisor of N.
        pieces: c, a divisor of K.
    """
    rows, depth = weight.shape
    panels = weight.reshape(rows // width, width, pieces, depth // pieces).transpose(2, 0, 3, 1)
    panels = mx.contiguous(panels[0] if pieces == 1 else panels)
    mx.eval(panels)
    return panels


def from_panels(panels: mx.array) -> mx.array:
    """The inverse of `to_panels`."""
    panels = panels.reshape(-1, *panels.shape[-3:])
    pieces, count, depth, width = panels.shape
    return panels.transpose(1, 3, 0, 2).reshape(count * width, pieces * depth)


def panel_shape(weight: mx.array) -> tuple[int, int] | None:
    """Width of the panels and number of pieces for a weight (N, K); None where it is better left alone."""
    rows, depth = weight.shape
    if weight.dtype != mx.float32:
        return None
    whole = [w for w in _WIDTHS if rows % w == 0 and _ROWS * w * depth <= _LIMIT]
    if whole:
        return whole[0], 1
    most = _LIMIT // (_ROWS * _WIDTHS[0])
    cuts = [depth // piece for piece in range(most, _SHALLOW - 1, -1) if depth % piece == 0]
    return (_WIDTHS[0], cuts[0]) if cuts and rows % _WIDTHS[0] == 0 else None


_faster: bool | None = None


def panels_are_faster() -> bool:
    """Whether panels beat the usual layout on this processor; timed once per process, in some 10 ms."""
    global _faster
    if _faster is None:
        _faster = openblas_is_loaded() and on_cpu() and _compare()
    return _faster


def _compare() -> bool:
    weight = mx.random.normal(_SAMPLE, key=mx.random.key(0))
    x = mx.random.normal((4, _SAMPLE[1]), key=mx.random.key(1))
    panels = to_panels(weight, _WIDTHS[0])
    mx.eval(x, weight)
    return _best(lambda: multiply(x, panels)) < _WORTH_IT * _best(lambda: x @ weight.T)


def _best(work: Callable[[], mx.array]) -> float:
    """Seconds of the fastest of some rounds."""
    return min(timeit.repeat(lambda: mx.eval([work() for _ in range(4)]), repeat=8, number=1))
