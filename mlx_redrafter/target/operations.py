"""The operations that a model finds in place of MLX's in calls of ours: rope, attention, softmax and SwiGLU.

Knows nothing of trees, nor of caches. Rope takes a position per row. The others differ on a CPU in float32 alone:

- MLX's attention makes a product for every head and computes all scores of a prompt at once, also those behind the
  diagonal, which nobody looks at. Here heads that share keys have one product, and a prompt's rows come part by part.
- Most of what a further row costs are exponentials, which MLX computes one by one. Here they are polynomials, which a
  compiler turns into vector instructions. macOS has vectors of its own for them.

A GPU has fused kernels for all of that, and keeps them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations, llama

from mlx_redrafter.system.device import on_cpu

FAST_ROPE, FAST_ATTENTION, MLX_LM_SWIGLU = mx.fast.rope, mx.fast.scaled_dot_product_attention, activations.swiglu
_AT_ONCE = 1 << 16  # scores of attention, and gates, that are computed at once, about: what lies between takes little
_PART = 8, 64  # rows of each text whose attention is computed at once, at least and at most
_FEWEST_GATES, _FEWEST_SCORES = 1024, 4096  # numbers from which on polynomials pay; a softmax is five operations more

# exp(x) = 2^n exp(r) with r = x - n log 2 below 0.35, whose Taylor series is exact to the last bit after 8 terms.
_TAYLOR = [1 / math.factorial(k) for k in reversed(range(8))]
_LOG2, _LOG2_REST = 0.693359375, -2.12194440e-4  # log 2 in two parts, of which n times the first is exact
_ROUND = 1.5 * 2.0**23  # a float32 this large has no fraction, so adding it rounds; its low bits then hold n
_FARTHEST = 87.0  # beyond which, on either side, no float32 is


class _Calls(threading.local):
    """Calls of ours that build a graph in this thread, one inside the other.

    Attributes:
        depth: how many there are.
        positions: of the rows that the model reads, as `positions_per_row` was given them.
        tables: cosines and sines that all layers share; None where MLX's rope is faster.
    """

    depth = 0
    positions: mx.array | None = None
    tables: dict[Any, Any] | None = None


_CALLS = _Calls()
_LOCK = threading.Lock()
_users = [0]


@contextlib.contextmanager
def positions_per_row(positions: mx.array | None = None) -> Iterator[None]:
    """While it lasts, `mx.fast.rope` also takes offsets of shape (B, M), one per row of (B, ..., M, dims).

    MLX takes one offset per batch entry, so the rows are moved to the batch axis. Every
    rope of mlx-lm ends in this function, whatever scales its frequencies and however it
    is called. Calls from other threads do what they always did. Attention is ours meanwhile,
    and so is the SwiGLU of models that were told of it, see `speed_up`.

    Args:
        positions: (B, M), or (B,) the first ones, of the rows that the model reads; in
            place of whole numbers that a model finds by counting the rows of its keys.
            Those that hold already where none are given.
    """
    before = _CALLS.positions, _CALLS.tables
    _CALLS.positions = before[0] if positions is None else positions
    _CALLS.tables = {} if mx.default_device() == mx.cpu else None
    _CALLS.depth += 1
    with _LOCK:
        _users[0] += 1
        mx.fast.rope, mx.fast.scaled_dot_product_attention = _rope, attention  # type: ignore[assignment]
    try:
        yield
    finally:
        _CALLS.positions, _CALLS.tables = before
        _CALLS.depth -= 1
        with _LOCK:
            _users[0] -= 1
            if not _users[0]:
                mx.fast.rope, mx.fast.scaled_dot_product_attention = FAST_ROPE, FAST_ATTENTION


def _rope(a: mx.array, dims: int, *, offset: Any, **options: Any) -> mx.array:
    if isinstance(offset, int) and _CALLS.positions is not None:
        offset = _CALLS.positions
    if isinstance(offset, mx.array) and offset.ndim == 2 and (a.shape[0], a.shape[-2]) != tuple(offset.shape):
        raise ValueError(f"rope over {a.shape[-2]} rows where a tree has {offset.shape[1]}")
    tables = _CALLS.tables
    # MLX turns half precision in float32 and rounds once; tables in it would round more often.
    if tables is None or a.shape[-1] != dims or a.dtype != mx.float32:
        return _rope_per_row(a, dims, offset, options)
    # The CPU has no rope of its own: each call is some twenty operations, most of them on the positions alone. So
    # cosines and sines are computed once for all layers: what MLX's rope makes of the pair (1, 0) is (cos, sin).
    shape = (a.shape[0], *(1 for _ in a.shape[1:-2]), a.shape[-2], dims)
    given = [("offset", offset), *sorted(options.items())]
    key = (shape, *((name, id(value) if isinstance(value, mx.array) else value) for name, value in given))
    if key not in tables:
        first, swap = _pairs(dims, bool(options.get("traditional")), a.dtype)
        turned = _rope_per_row(mx.broadcast_to(first, shape), dims, offset, options)
        cosines, sines = turned * first, turned * (1 - first)
        kept = (offset, options)  # no other array may get the id of one of these meanwhile
        tables[key] = (cosines + cosines @ swap, sines - sines @ swap, swap, kept)
    cosines, sines, swap, _ = tables[key]
    return a * cosines + (a @ swap) * sines


def _rope_per_row(a: mx.array, dims: int, offset: Any, options: dict[str, Any]) -> mx.array:
    """MLX's rope with the rows on the batch axis where each has a position of its own."""
    if not isinstance(offset, mx.array) or offset.ndim != 2:
        return FAST_ROPE(a, dims, offset=offset, **options)
    batch, rows = offset.shape
    by_head = a if a.ndim == 4 else a.reshape(batch, -1, rows, a.shape[-1])
    heads = by_head.shape[1]
    moved = by_head.swapaxes(1, 2).reshape(batch * rows, heads, 1, -1)
    turned = FAST_ROPE(moved, dims, offset=offset.reshape(-1), **options)
    turned = turned.reshape(batch, rows, heads, -1).swapaxes(1, 2)
    return turned if a.ndim == 4 else turned.reshape(a.shape)


@functools.lru_cache(maxsize=16)
def _pairs(dims: int, traditional: bool, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """(dims,) 1 at the first of each pair that rope turns, 0 at the second; (dims, dims) what swaps the two."""
    half = dims // 2
    partner = [i ^ 1 for i in range(dims)] if traditional else [(i + half) % dims for i in range(dims)]
    first, swap = mx.array([partner[i] > i for i in range(dims)], dtype), mx.eye(dims, dtype=dtype)[mx.array(partner)]
    mx.eval(swap)  # another thread, with other streams, may be the next to use it
    return first, swap


def attention(queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, **options: Any) -> mx.array:
    """What mx.fast's makes of queries (B, H, M, D), keys (B, K, L, D), values (B, K, L, E): (B, H, M, E)."""
    mask, others = options.get("mask"), {name: value for name, value in options.items() if name != "mask"}
    elsewhere = mx.default_device() != mx.cpu or queries.dtype != mx.float32 or not _CALLS.depth
    if elsewhere or any(value is not None for value in others.values()):
        return FAST_ATTENTION(queries, keys, values, scale=scale, **options)
    batch, heads, rows, width = queries.shape
    shared, columns = keys.shape[1:3]
    found, grouped = [], (batch, shared, heads // shared)
    size = max(_PART[0], min(_PART[1], _AT_ONCE // (batch * heads * columns)))
    for first in range(0, rows, size):
        part, visible, seen = slice(first, min(first + size, rows)), columns, mask
        if isinstance(mask, str):  # "causal": the last row sees all columns, each one before it one fewer
            visible = columns - rows + part.stop
            seen = mx.arange(visible) <= mx.arange(columns - rows + first, visible)[:, None] if rows > 1 else None
        elif mask is not None and mask.shape[-2] > 1:
            seen = mask[..., part, :]
        some = (queries[:, :, part] * scale).reshape(batch, shared, -1, width)
        scores = some @ keys[:, :, :visible].swapaxes(-1, -2)
        if seen is not None:  # it broadcasts to (B, H, M, L)
            seen = seen.reshape(*(1,) * (4 - seen.ndim), *seen.shape)
            apart = (1, 1) if seen.shape[1] == 1 else grouped[1:]
            seen = seen.reshape(seen.shape[0], *apart, *seen.shape[2:])
            each = scores.reshape(*grouped, -1, visible)
            each = mx.where(seen, each, mx.finfo(mx.float32).min) if seen.dtype == mx.bool_ else each + seen
            scores = each.reshape(scores.shape)
        if quick(scores):
            numerators, total = softmax_parts(scores)
            mixed = numerators @ values[:, :, :visible] / total
        else:
            mixed = mx.softmax(scores, axis=-1) @ values[:, :, :visible]
        found.append(mixed.reshape(batch, heads, -1, values.shape[-1]))
    return found[0] if len(found) == 1 else mx.concatenate(found, axis=2)


def one_by_one() -> bool:
    """Whether MLX computes exponentials one by one here."""
    return on_cpu() and sys.platform != "darwin"


def quick(numbers: mx.array, fewest: int = _FEWEST_SCORES) -> bool:
    """Whether these numbers are computed faster here."""
    return fewest <= numbers.size and numbers.dtype == mx.float32 and one_by_one()


def speed_up(model: nn.Module) -> None:
    """Lets the SwiGLU of the model, and of heads, be the one below in calls of ours; mlx-lm's loop keeps its own."""
    if not one_by_one():
        return
    for name in {llama.__name__, *(type(module).__module__ for module in model.modules())}:
        where = sys.modules.get(name)
        if getattr(where, "swiglu", None) is MLX_LM_SWIGLU:
            where.swiglu = swiglu  # type: ignore[union-attr]


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """gate sigmoid(gate) x."""
    ours = _CALLS.depth > 0 and quick(gate, _FEWEST_GATES)
    result: mx.array = (_swiglu if ours else MLX_LM_SWIGLU)(gate, x)
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
    parts = -(-gate.size // _AT_ONCE)
    if parts == 1:
        return _gated(gate, x, _exp(-gate))
    size = -(-gate.shape[-2] // parts)
    apart = (mx.split(a, range(size, gate.shape[-2], size), axis=-2) for a in (gate, x))
    return mx.concatenate([_gated(a, b, _exp(-a)) for a, b in zip(*apart)], axis=-2)


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
