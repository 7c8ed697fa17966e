"""What mlx_lm writes, which is what every loop of ours is compared with."""

from __future__ import annotations

import mlx_redrafter  # isort: skip # noqa: F401 (before mlx: it puts OpenBLAS in front of MLX's BLAS)

import mlx.core as mx
from mlx_lm.generate import generate_step


def by_mlx_lm(model, prompt, count):
    return [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=count)]


def own_text(model, prompt, count, ends=()):
    """mlx_lm's own greedy continuation, cut after the first ending token."""
    tokens = by_mlx_lm(model, prompt, count)
    end = next((i + 1 for i, token in enumerate(tokens) if token in ends), count)
    return tokens[:end]
