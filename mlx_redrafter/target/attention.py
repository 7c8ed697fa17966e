"""Attention on a CPU: heads that share keys in one product, and the rows of a prompt part by part.

Knows nothing of caches. MLX's attention on a CPU makes a product for every head and computes all scores of a prompt
at once, also those behind the diagonal, which nobody looks at; exponentials are most of its time. A GPU has one fused
kernel for all of that, and keeps it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_redrafter.target.exponentials import AT_WORK, quick, softmax_parts

MLXS = mx.fast.scaled_dot_product_attention
_SCORES = 1 << 20  # numbers that are computed at once, about
_ROWS = 8, 64  # of each text in a part, at least and at most


def attention(queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, **options: Any) -> mx.array:
    """What mx.fast's makes of queries (B, H, M, D), keys (B, K, L, D), values (B, K, L, E): (B, H, M, E)."""
    mask, others = options.get("mask"), {name: value for name, value in options.items() if name != "mask"}
    elsewhere = mx.default_device() != mx.cpu or queries.dtype != mx.float32 or not AT_WORK.depth
    if elsewhere or any(value is not None for value in others.values()):
        return MLXS(queries, keys, values, scale=scale, **options)
    batch, heads, rows, width = queries.shape
    shared, columns = keys.shape[1:3]
    found, grouped = [], (batch, shared, heads // shared)
    size = max(_ROWS[0], min(_ROWS[1], _SCORES // (batch * heads * columns)))
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
        if quick(scores, rows):
            numerators, total = softmax_parts(scores)
            mixed = numerators @ values[:, :, :visible] / total
        else:
            mixed = mx.softmax(scores, axis=-1) @ values[:, :, :visible]
        found.append(mixed.reshape(batch, heads, -1, values.shape[-1]))
    return found[0] if len(found) == 1 else mx.concatenate(found, axis=2)
