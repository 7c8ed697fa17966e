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
from mlx_lm.models import activations, llama

from mlx_redrafter.system.device import on_cpu

MLXS = activations.swiglu
_SWIGLU, _SOFTMAX = 1024, 4096  # numbers from which on it pays; a softmax is five operations more
_MOST, _ROWS = 1 << 18, 32  # numbers, and rows of each text, above which what lies between takes too much memory

# exp(x) = 2^n exp(r) with r = x - n log 2 below 0.35, whose Taylor series is exact to the last bit after 8 terms.
_TAYLOR = [1 / math.factorial(k) for k in reversed(range(8))]
_LOG2, _LOG2_REST = 0.693359375, -2.12194440e-4  # log 2 in two parts, of which n times the first is exact
_ROUND = 1.5 * 2.0**23  # a float32 this large has no fraction, so adding it rounds; its low bits then hold n
_FARTHEST = 87.0  # beyond which, on either side, no float32 is


class _Work(threading.local):
    """How many calls of ours build a graph in this thread, one inside the other."""

    depth = 0


AT_WORK = _Work()


def one_by_one() -> bool:
    """Whether MLX computes exponentials one by one here."""
    return on_cpu() and sys.platform != "darwin"


def quick(numbers: mx.array, rows: int, fewest: int = _SOFTMAX) -> bool:
    """Whether these numbers, of so many rows of each text, are computed faster here."""
    few = rows <= _ROWS and fewest <= numbers.size <= _MOST
    return few and numbers.dtype == mx.float32 and one_by_one()


def speed_up(model: nn.Module) -> None:
    """Lets the SwiGLU of the model, and of heads, be the one below in calls of ours; mlx-lm's loop keeps its own."""
    if not one_by_one():
        return
    for name in {llama.__name__, *(type(module).__module__ for module in model.modules())}:
        where = sys.modules.get(name)
        if getattr(where, "swiglu", None) is MLXS:
            where.swiglu = swiglu  # type: ignore[union-attr]


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """gate sigmoid(gate) x."""
    ours = AT_WORK.depth > 0 and quick(gate, gate.shape[-2], _SWIGLU)
    result: mx.array = (_swiglu if ours else MLXS)(gate, x)
    return result


def softmax_parts(scores: mx.array) -> tuple[mx.array, mx.array]:
    """The numerators of a softmax over the last axis, and their sum with that axis kept."""
    largest = mx.stop_gradient(mx.max(scores, axis=-1, keepdims=True))  # both parts have it, so it moves neither
    numerators: Any = _exp(scores - largest)
    return numerators, mx.sum(numerators, axis=-1, keepdims=True)


_compiled: Callable[[Any], Any] = functools.partial(mx.compile, shapeless=True)


def _polynomial(x: mx.array, coefficients: tuple[float, ...] | list[float]) -> Any:
    """By Horner's rule, the coefficient of the highest power first."""
    value: Any = coefficients[0]
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _swiglu(gate: mx.array, x: mx.array) -> mx.array:
    result: mx.array = _gated(gate, x, _exp(-gate))
    return result


@_compiled
def _gated(gate: mx.array, x: mx.array, power: mx.array) -> mx.array:
    return gate / (1 + power) * x


@mx.custom_function
def _exp(x: mx.array) -> mx.array:
    series, rounded = _split(x)
    return series * mx.view(_power(mx.view(rounded, mx.int32)), mx.float32)


@_exp.vjp
def _exp_vjp(_: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    """Heads are trained through their layers, and bits have no derivative."""
    return cotangent * output


@_compiled
def _split(x: mx.array) -> tuple[mx.array, mx.array]:
    """exp(r), and n in the low bits."""
    x = mx.clip(x, -_FARTHEST, _FARTHEST)
    rounded = x * (1 / math.log(2)) + _ROUND
    n = rounded - _ROUND
    return _polynomial(x - n * _LOG2 - n * _LOG2_REST, _TAYLOR), rounded


@_compiled
def _power(bits: mx.array) -> mx.array:
    """The bits of 2^n as a float32."""
    return mx.left_shift(bits, 23) + (127 << 23)
