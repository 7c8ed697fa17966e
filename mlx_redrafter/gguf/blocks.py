"""ggml's blocks of 32 weights as MLX's packed weights, scales and biases, bit for bit; all others as numbers."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Type

from mlx_redrafter.errors import UserError
from mlx_redrafter.gguf.file import Tensor

GROUP = 32  # weights of a block, and of a group of MLX's
PACKED_BITS = {Type.Q4_0: 4, Type.Q4_1: 4, Type.Q8_0: 8}
FLOATS = {Type.F32: "F32", Type.F16: "F16", Type.BF16: "BF16"}
_CHUNK = 2**22  # weights that are in memory as numbers at a time


def can_read(kind: Type) -> bool:
    """Whether gguf can turn weights of this type into numbers."""
    if kind in FLOATS:
        return True
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def packed_weight(tensor: Tensor, order: np.ndarray | None) -> np.ndarray:
    """(rows, columns * bits / 32) uint32, as MLX packs them: the first weight in the lowest bits.

    Args:
        tensor: of a type in PACKED_BITS.
        order: the row to put at each place; None for as they are.
    """
    blocks = _blocks(tensor, order)
    rows = blocks.shape[0]
    if tensor.type == Type.Q8_0:  # signed there, unsigned here
        return (blocks[:, :, 2:] ^ np.uint8(0x80)).reshape(rows, -1).view(np.uint32)
    halves = blocks[:, :, -16:]  # weight i in the low half of byte i, weight 16 + i in its high half
    weights = np.concatenate([halves & 15, halves >> 4], axis=-1)
    return (weights[..., 0::2] | weights[..., 1::2] << 4).reshape(rows, -1).view(np.uint32)


def packed_scales(tensor: Tensor, order: np.ndarray | None) -> np.ndarray:
    """(rows, columns / 32) float16."""
    return _halves(_blocks(tensor, order), 0)


def packed_biases(tensor: Tensor, order: np.ndarray | None) -> np.ndarray:
    """(rows, columns / 32) float16, what MLX adds after it has scaled.

    Raises:
        UserError: float16 holds one of them no more; no sensible file has such a scale.
    """
    blocks = _blocks(tensor, order)
    if tensor.type == Type.Q4_1:
        return _halves(blocks, 2)
    zero = {Type.Q4_0: -8, Type.Q8_0: -128}[tensor.type]
    with np.errstate(over="ignore", invalid="ignore"):
        biases = _halves(blocks, 0) * np.float16(zero)
    if not np.isfinite(biases).all():
        raise UserError(f"{tensor.path}: tensor {tensor.name!r} has a scale that MLX cannot hold; try --dequantize")
    return biases


def numbers(
    tensor: Tensor, order: np.ndarray | None, dtype: str, change: Callable[[np.ndarray], np.ndarray] | None = None
) -> memoryview:
    """The bytes of a tensor as numbers, row-major.

    Args:
        order: the row to put at each place; None for as they are.
        dtype: "F32", "F16" or "BF16".
        change: is done to the numbers as float32.
    """
    # The rows of a bias are its numbers. llama.cpp never has vectors in blocks, so a row is never less than one.
    all_rows = tensor.rows if order is None else tensor.rows.reshape(tensor.shape[0], -1)
    at_once = max(1, _CHUNK // tensor.shape[-1])
    result = bytearray()
    for begin in range(0, len(all_rows), at_once):
        rows = all_rows[slice(begin, begin + at_once) if order is None else order[begin : begin + at_once]]
        if change is None and FLOATS.get(tensor.type) == dtype:
            result += rows.tobytes()
            continue
        values = gguf.dequantize(rows, tensor.type)
        result += as_bytes(values if change is None else change(values), dtype)
    return memoryview(result)


def as_bytes(values: np.ndarray, dtype: str) -> bytes:
    """float32 numbers as the bytes of another type, rounded to nearest."""
    if dtype == "F32":
        return values.tobytes()
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).tobytes()
    return np.array(mx.array(values).astype(mx.bfloat16).view(mx.uint16)).tobytes()


def fits(values: np.ndarray, dtype: str) -> bool:
    """Whether float32 numbers are the same in another type."""
    kind = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[dtype]
    before = mx.array(values)
    return bool(mx.array_equal(before.astype(kind).astype(mx.float32), before).item())


def _blocks(tensor: Tensor, order: np.ndarray | None) -> np.ndarray:
    """(rows, blocks of a row, bytes of a block) uint8."""
    rows = tensor.rows if order is None else tensor.rows[order]
    return rows.reshape(len(rows), -1, gguf.GGML_QUANT_SIZES[tensor.type][1])


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 numbers at a place of every block."""
    return np.ascontiguousarray(blocks[:, :, at : at + 2]).view(np.float16)[..., 0]
