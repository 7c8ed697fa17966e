"""Sends parts of a step to the CPU while the rest of its graph is still being built.

MLX's CPU backend lets the host run about a hundred operations ahead of the device, so a
step submitted as a whole keeps the device waiting while the next one is built. Where a
GPU is the device, command buffers reach further ahead than a step, and each submission
would cost one.
"""

from __future__ import annotations

import mlx.core as mx


def submit_part(*arrays: mx.array) -> None:
    """Starts computing arrays that a graph under construction has come to; on a GPU, nothing."""
    if helps():
        mx.async_eval(*arrays)


def helps() -> bool:
    """Whether the device is one that a step has to be sent to in parts."""
    return mx.default_device() == mx.cpu
