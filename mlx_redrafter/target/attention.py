"""Attention on a CPU: heads that share keys in one product, and the rows of a prompt part by part.

Knows nothing of caches. MLX's attention on a CPU makes a product for every head and computes all scores of a prompt
at once, also those behind the diagonal, which nobody looks at; exponentials are most of its time. A GPU has one fused
kernel for all of that, and keeps it.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_redrafter.target.fast import Replacement

_SCORES = 1 << 20  # numbers that are computed at once, about
_ROWS = 8, 64  # of each text in a part, at least and at most


def _attention(queries: mx.array, keys: mx.array, values: mx.array, *, scale: float, **options: Any) -> mx.array:
    """What mx.fast's makes of queries (B, H, M, D), keys (B, K, L, D), values (B, K, L, E): (B, H, M, E)."""
    mask, others = options.get("mask"), {name: value for name, value in options.items() if name != "mask"}
    if any(value is not None for value in others.values()) or queries.dtype != mx.float32 or _on_another_device():
        return ATTENTION.own(queries, keys, values, scale=scale, **options)  # type: ignore[no-any-return]
    batch, heads, rows, _ = queries.shape
    columns, found = keys.shape[2], []
    size = max(_ROWS[0], min(_ROWS[1], _SCORES // (batch * heads * columns)))
    for first in range(0, rows, size):
        last = min(first + size, rows)
        visible, part = columns, mask
        if isinstance(mask, str):  # "causal": the last row sees all columns, each one before it one fewer
            visible = columns - rows + last
            part = mx.arange(visible) <= mx.arange(columns - rows + first, visible)[:, None]
            part = part if rows > 1 else None
        elif mask is not None and mask.shape[-2] > 1:
            part = mask[..., first:last, :]
        found.append(_some_rows(queries[:, :, first:last] * scale, keys[:, :, :visible], values[:, :, :visible], part))
    return found[0] if len(found) == 1 else mx.concatenate(found, axis=2)


def _some_rows(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None) -> mx.array:
    """All heads that share keys at once; the mask broadcasts to (B, H, M, L), and is added where it is no bool."""
    batch, heads, rows, width = queries.shape
    shared, columns = keys.shape[1:3]
    group = heads // shared
    scores = queries.reshape(batch, shared, group * rows, width) @ keys.swapaxes(-1, -2)
    if mask is not None:
        mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
        parts = mask.shape[:1] + ((1, 1) if mask.shape[1] == 1 else (shared, group))
        mask = mask.reshape(*parts, *mask.shape[2:])
        scores = scores.reshape(batch, shared, group, rows, columns)
        scores = mx.where(mask, scores, mx.finfo(mx.float32).min) if mask.dtype == mx.bool_ else scores + mask
        scores = scores.reshape(batch, shared, group * rows, columns)
    return (mx.softmax(scores, axis=-1) @ values).reshape(batch, heads, rows, -1)


def _on_another_device() -> bool:
    return bool(mx.default_device() != mx.cpu)


ATTENTION = Replacement("scaled_dot_product_attention", _attention)
