"""Sends parts of a step to the CPU while the rest of its graph is still being built.

MLX's CPU backend lets the host run about a hundred operations ahead of the device, so a
step submitted as a whole keeps the device waiting while the next one is built. Where a
GPU is the device, command buffers reach further ahead than a step, and each submission
would cost one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import mlx.core as mx

_whole = False  # while it is True, nothing is sent before its graph is complete


def submit_part(*arrays: mx.array) -> None:
    """Starts computing arrays that a graph under construction has come to; on a GPU, nothing."""
    if not _whole and mx.default_device() == mx.cpu:
        mx.async_eval(*arrays)


@contextlib.contextmanager
def in_one_piece() -> Iterator[None]:
    """While it lasts, graphs are only built, as on a GPU: to be traced, or timed apart from their building."""
    global _whole
    before, _whole = _whole, True
    try:
        yield
    finally:
        _whole = before
