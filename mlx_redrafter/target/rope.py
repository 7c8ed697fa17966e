"""Gives rope a position per row while one call of a model builds its graph.

Knows nothing of trees: any positions will do.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from mlx_redrafter.target.attention import MLXS, attention
from mlx_redrafter.target.exponentials import AT_WORK


@contextlib.contextmanager
def positions_per_row(positions: mx.array | None = None) -> Iterator[None]:
    """While it lasts, `mx.fast.rope` also takes offsets of shape (B, M), one per row of (B, ..., M, dims).

    MLX takes one offset per batch entry, so the rows are moved to the batch axis. Every
    rope of mlx-lm ends in this function, whatever scales its frequencies and however it
    is called. Calls from other threads do what they always did. Attention is ours meanwhile, see `attention`, and so
    are exponentials on a CPU, see `exponentials`.

    Args:
        positions: (B, M), or (B,) the first ones, of the rows that the model reads; in
            place of whole numbers that a model finds by counting the rows of its keys.
            Those that hold already where none are given.
    """
    before = getattr(_LOCAL, "positions", None), getattr(_LOCAL, "tables", None)
    _LOCAL.positions = before[0] if positions is None else positions
    _LOCAL.tables = {} if mx.default_device() == mx.cpu else None
    AT_WORK.depth += 1
    with _LOCK:
        _users[0] += 1
        mx.fast.rope, mx.fast.scaled_dot_product_attention = _rope, attention  # type: ignore[assignment]
    try:
        yield
    finally:
        _LOCAL.positions, _LOCAL.tables = before
        AT_WORK.depth -= 1
        with _LOCK:
            _users[0] -= 1
            if not _users[0]:
                mx.fast.rope, mx.fast.scaled_dot_product_attention = _FAST_ROPE, MLXS


def _rope(a: mx.array, dims: int, *, offset: Any, **options: Any) -> mx.array:
    if isinstance(offset, int) and (positions := getattr(_LOCAL, "positions", None)) is not None:
        offset = positions
    if isinstance(offset, mx.array) and offset.ndim == 2 and (a.shape[0], a.shape[-2]) != tuple(offset.shape):
        raise ValueError(f"rope over {a.shape[-2]} rows where a tree has {offset.shape[1]}")
    tables = getattr(_LOCAL, "tables", None)
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
        return _FAST_ROPE(a, dims, offset=offset, **options)
    batch, rows = offset.shape
    by_head = a if a.ndim == 4 else a.reshape(batch, -1, rows, a.shape[-1])
    heads = by_head.shape[1]
    moved = by_head.swapaxes(1, 2).reshape(batch * rows, heads, 1, -1)
    turned = _FAST_ROPE(moved, dims, offset=offset.reshape(-1), **options)
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


_FAST_ROPE = mx.fast.rope
_LOCK = threading.Lock()
_LOCAL = threading.local()
_users = [0]
