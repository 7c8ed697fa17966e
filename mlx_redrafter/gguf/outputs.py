"""What is written for each parameter: packed weights, scales and biases, or numbers of one type."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from mlx_redrafter.errors import UserError
from mlx_redrafter.gguf.blocks import (
    FLOATS,
    GROUP,
    PACKED_BITS,
    can_read,
    fits,
    numbers,
    packed_biases,
    packed_scales,
    packed_weight,
)
from mlx_redrafter.gguf.file import GGUF, Tensor
from mlx_redrafter.gguf.names import is_shifted, parameters, row_order

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclasses.dataclass(frozen=True)
class Output:
    """A tensor to write: its safetensors type, its shape, and what makes its bytes."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], bytes | memoryview]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is to be written of a file's weights.

    Attributes:
        outputs: by name.
        dtype: of the numbers that the model computes with, as in config.json.
        quantization: config.json's; None where nothing is packed.
        kept, changed: how many tensors of each type are as they were, and how many are numbers of `dtype` now.
    """

    outputs: dict[str, Output]
    dtype: str
    quantization: dict[str, Any] | None
    kept: Counter[str]
    changed: Counter[str]


def plan(file: GGUF, config: dict[str, Any], dequantize: bool, dtype: str | None) -> Plan:
    """Decides what becomes of every tensor; reads the small ones.

    Args:
        config: of the unquantised model.
        dequantize: write all weights as numbers.
        dtype: of all numbers; None keeps those of the file, and has float16 for weights that
            cannot stay as they are.

    Raises:
        UserError: the tensors are not those of the model, or of a type that gguf cannot read.
    """
    tensors = parameters(file, config)
    for tensor in tensors.values():
        if not can_read(tensor.type):
            raise UserError(
                f"{file.path}: tensor {tensor.name!r} is of type {tensor.type.name}, which gguf cannot read"
            )
        if len(tensor.shape) == 1 and tensor.type not in FLOATS:
            raise UserError(f"{file.path}: vector {tensor.name!r} is of type {tensor.type.name}, expected numbers")
    wanted = None if dtype is None else DTYPES[dtype]
    working = wanted or _working_type(tensors.values())
    vectors = wanted or _vector_type(file, tensors.values(), working)
    outputs: dict[str, Output] = {}
    bits: dict[str, int] = {}
    kept: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    for name, tensor in tensors.items():
        order = row_order(file, tensor, config)
        matrix = len(tensor.shape) > 1  # or as many as there are experts
        if tensor.type in PACKED_BITS and matrix and not dequantize:
            module = name.removesuffix(".weight")
            bits[module] = PACKED_BITS[tensor.type]
            outputs |= _packed(module, tensor, order, wanted or "F16")
            kept[tensor.type.name] += 1
            continue
        own = FLOATS.get(tensor.type)
        kind = vectors if own == "F32" and not matrix else wanted or own or working
        outputs[name] = _numbers(tensor, order, kind, is_shifted(file, tensor))
        as_it_was = kind == own or (own is not None and not matrix)
        (kept if as_it_was else changed)[tensor.type.name] += 1
    return Plan(outputs, _long(working), _quantization(bits), kept, changed)


def _packed(module: str, tensor: Tensor, order: np.ndarray | None, kind: str) -> dict[str, Output]:
    *rows, columns = tensor.shape
    words = columns * PACKED_BITS[tensor.type] // 32

    def words_of() -> memoryview:
        return packed_weight(tensor, order).data.cast("B")

    def halves_of(read: Callable[[Tensor, np.ndarray | None], np.ndarray]) -> bytes | memoryview:
        values = np.ascontiguousarray(read(tensor, order))
        halves = dataclasses.replace(tensor, type=Type.F16, shape=values.shape, rows=values.view(np.uint8))
        return numbers(halves, None, kind)

    small = (*rows, columns // GROUP)
    return {
        f"{module}.weight": Output("U32", (*rows, words), words_of),
        f"{module}.scales": Output(kind, small, functools.partial(halves_of, packed_scales)),
        f"{module}.biases": Output(kind, small, functools.partial(halves_of, packed_biases)),
    }


def _numbers(tensor: Tensor, order: np.ndarray | None, kind: str, shifted: bool) -> Output:
    change = (lambda values: values - np.float32(1)) if shifted else None
    return Output(kind, tensor.shape, functools.partial(numbers, tensor, order, kind, change))


def _working_type(tensors: Any) -> str:
    """The type of a model's numbers: that of its matrices where they have one, float16 where they have none."""
    kinds = {tensor.type for tensor in tensors if len(tensor.shape) == 2}
    for kind in (Type.F32, Type.BF16):
        if kinds <= {Type.F32, kind}:
            return FLOATS[kind]
    return "F16"


def _vector_type(file: GGUF, tensors: Any, working: str) -> str:
    """The type for norms and biases, which llama.cpp always writes as float32: the matrices', if it holds them all.

    One norm in float32 makes a whole model compute in float32, at half the speed. Most models
    were trained with norms of 16 bits, and lose nothing in going back.
    """
    for tensor in tensors:
        if tensor.type == Type.F32 and len(tensor.shape) == 1:
            values = gguf.dequantize(tensor.rows, tensor.type)
            if not fits(values - np.float32(1) if is_shifted(file, tensor) else values, working):
                return "F32"
    return working


def _quantization(bits: dict[str, int]) -> dict[str, Any] | None:
    """mlx-lm's field: the usual bits, and those of each layer that differs."""
    if not bits:
        return None
    usual = Counter(bits.values()).most_common(1)[0][0]
    group = {"group_size": GROUP, "mode": "affine"}
    others = {name: {"bits": count} | group for name, count in bits.items() if count != usual}
    return {"bits": usual} | group | others


def _long(kind: str) -> str:
    return next(name for name, short in DTYPES.items() if short == kind)
