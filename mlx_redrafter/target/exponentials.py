"""SwiGLU and softmax on a CPU, without the exponentials that MLX computes there one by one.

Most of what a further row costs on such a CPU are its exponentials. Here they are polynomials, which a compiler turns
into vector instructions. macOS has vectors of its own for them, and a GPU does not mind. Knows nothing of models.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations

MLXS = activations.swiglu
AT_WORK = threading.local()  # its `depth` is above 0 while a call of ours builds a graph in this thread
_SWIGLU, _SOFTMAX = 1024, 4096  # numbers from which on it pays; a softmax is five operations more
_MOST, _ROWS = 1 << 18, 32  # numbers, and rows of each text, above which what lies between takes too much memory

# sigmoid(x) = 1/2 + x P(x^2) / Q(x^2) up to 2e-7 where |x| <= 16, and above that with x cut there: fitted by
# least squares, reweighted until the error was the same everywhere.
_P = (4.41807337e-08, 4.59192524e-05, 8.07102863e-03, 0.249999836)
_Q = (9.46818179e-10, 3.7035793e-06, 1.48524041e-03, 0.115616858, 1.0)
_FARTHEST = 16.0

# exp(x) = 2^n exp(r) with r = x - n log 2 below 0.35, whose Taylor series is exact to the last bit after 8 terms.
_TAYLOR = [1 / math.factorial(k) for k in reversed(range(8))]
_LOG2, _LOG2_REST = 0.693359375, -2.12194440e-4  # log 2 in two parts, of which n times the first is exact
_ROUND = 1.5 * 2.0**23  # a float32 this large has no fraction, so adding it rounds; its low bits then hold n
_LEAST = -87.0  # the smallest exponent of a float32


def quick(numbers: mx.array, rows: int, fewest: int = _SOFTMAX) -> bool:
    """Whether these numbers, of so many rows of each text, are computed faster here."""
    few = rows <= _ROWS and fewest <= numbers.size <= _MOST
    return few and numbers.dtype == mx.float32 and sys.platform != "darwin" and mx.default_device() == mx.cpu


def speed_up(model: nn.Module) -> None:
    """Lets the model's SwiGLU be the one below, in calls of ours: mlx-lm's own loop keeps mlx-lm's."""
    if mx.default_device() != mx.cpu:
        return
    for name in {type(module).__module__ for module in model.modules()}:
        where = sys.modules.get(name)
        if getattr(where, "swiglu", None) is MLXS:
            where.swiglu = swiglu  # type: ignore[union-attr]


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """gate sigmoid(gate) x."""
    ours = getattr(AT_WORK, "depth", 0) > 0 and quick(gate, gate.shape[-2], _SWIGLU)
    result: mx.array = _swiglu(gate, x) if ours else MLXS(gate, x)
    return result


def softmax_parts(scores: mx.array) -> tuple[mx.array, mx.array]:
    """The numerators of a softmax over the last axis, and their sum with that axis kept."""
    parts: Any = _softmax(scores)
    return parts[0], parts[1]


@mx.custom_function
def _softmax(scores: mx.array) -> tuple[mx.array, mx.array]:
    series, rounded = _split(scores - mx.max(scores, axis=-1, keepdims=True))
    numerators = series * mx.view(_power(mx.view(rounded, mx.int32)), mx.float32)
    return numerators, mx.sum(numerators, axis=-1, keepdims=True)


@_softmax.vjp
def _softmax_vjp(_: mx.array, cotangents: Any, parts: Any) -> mx.array:
    """Heads are trained through their layers; the largest score counts as a constant, for both parts have it."""
    gradient: mx.array = parts[0] * (cotangents[0] + cotangents[1])
    return gradient


_compiled: Callable[[Any], Any] = functools.partial(mx.compile, shapeless=True)


def _polynomial(x: mx.array, coefficients: tuple[float, ...] | list[float]) -> Any:
    """By Horner's rule, the coefficient of the highest power first."""
    value: Any = coefficients[0]
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


@_compiled
def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    gate = mx.maximum(gate, -_FARTHEST)  # below, what comes out is 0 to six digits
    near = mx.minimum(gate, _FARTHEST)
    square = near * near
    return gate * (0.5 + near * _polynomial(square, _P) / _polynomial(square, _Q)) * x


@_compiled
def _split(x: mx.array) -> tuple[mx.array, mx.array]:
    """exp(r), and n in the low bits; for x <= 0."""
    x = mx.maximum(x, _LEAST)
    rounded = x * (1 / math.log(2)) + _ROUND
    n = rounded - _ROUND
    return _polynomial(x - n * _LOG2 - n * _LOG2_REST, _TAYLOR), rounded


@_compiled
def _power(bits: mx.array) -> mx.array:
    """The bits of 2^n as a float32."""
    return mx.left_shift(bits, 23) + (127 << 23)
