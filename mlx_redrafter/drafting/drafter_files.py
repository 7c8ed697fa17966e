"""What the files of all kinds of heads have in common: checked config keys, checked tensors, quantisation."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import replace_file


def whole_number(fields: dict[str, Any], key: str, least: int, source: str) -> int:
    """A key of a config.json. Raises UserError where it is missing or not a whole number from `least` on."""
    if key not in fields:
        raise UserError(f"{source}: key {key!r} is missing")
    value = fields[key]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**24:
        raise UserError(f"{source}: {key} is {value!r}, expected a whole number from {least} to {2**24 - 1}")
    return value


def read_quantization(fields: dict[str, Any], widths: dict[str, int], source: str) -> dict[str, int] | None:
    """The key "quantization" of a config.json, if it is there.

    Args:
        widths: the matrices' widths by name; all have to be quantised.

    Raises:
        UserError: one that mlx does not have, or that does not fit the widths.
    """
    quantization = fields.get("quantization")
    if quantization is None:
        return None
    if not (
        isinstance(quantization, dict) and all(isinstance(quantization.get(k), int) for k in ("group_size", "bits"))
    ):
        raise UserError(f"{source}: quantization is {quantization!r}, expected group_size and bits")
    try:
        check_quantization(quantization["bits"], quantization["group_size"])
        check_widths(widths, quantization["group_size"])
    except UserError as error:
        raise UserError(f"{source}: quantization: {error}") from error
    return quantization


def check_quantization(bits: int, group_size: int) -> None:
    """Raises UserError unless mlx has an affine quantisation of this kind."""
    if bits not in (2, 3, 4, 5, 6, 8):
        raise UserError(f"--q-bits is {bits}, expected 2, 3, 4, 5, 6 or 8")
    if group_size not in (32, 64, 128):
        raise UserError(f"--q-group-size is {group_size}, expected 32, 64 or 128")


def check_widths(widths: dict[str, int], group_size: int) -> None:
    """Raises UserError unless matrices of these widths can be quantised in groups of this size."""
    for name, width in widths.items():
        if width % group_size:
            raise UserError(f"--q-group-size is {group_size}, which does not divide the drafter's {name} {width}")


def quantize_head(head: Any, widths: dict[str, int], group_size: int, bits: int) -> None:
    """Quantises all matrices in place with mlx's affine scheme and notes it in the head's config.

    Raises:
        UserError: a width that the group size does not divide, or a scheme mlx does not have.
    """
    check_quantization(bits, group_size)
    check_widths(widths, group_size)
    nn.quantize(head, group_size=group_size, bits=bits)
    head.config.quantization = {"group_size": group_size, "bits": bits}


def fill(head: Any, weights: dict[str, mx.array], source: str) -> None:
    """Gives a new head its weights, every name and shape checked, and freezes it.

    Args:
        head: with a config that says how it is quantised.

    Raises:
        UserError: naming the first tensor that is missing, unknown or of another shape.
    """
    if head.config.quantization is not None:
        nn.quantize(head, head.config.quantization["group_size"], head.config.quantization["bits"])
    expected = dict(tree_flatten(head.parameters()))
    for name, value in expected.items():
        if name not in weights:
            raise UserError(f"{source}: tensor {name!r} is missing")
        if weights[name].shape != value.shape:
            raise UserError(f"{source}: tensor {name!r} has shape {weights[name].shape}, expected {value.shape}")
    if unknown := sorted(set(weights) - set(expected)):
        raise UserError(f"{source}: tensor {unknown[0]!r} does not belong to a drafter of this config")
    head.load_weights(list(weights.items()))
    head.freeze()


def save_head(head: Any, path: str | pathlib.Path) -> None:
    """Writes config.json and model.safetensors into a directory, each whole or not at all.

    Raises:
        UserError: the place cannot be written.
    """
    folder = pathlib.Path(path)
    weights = dict(tree_flatten(head.parameters()))
    with replace_file(folder / "model.safetensors") as file:
        mx.save_safetensors(str(file), weights, metadata={"format": "mlx"})
    with replace_file(folder / "config.json") as file:
        file.write_text(json.dumps(head.config.to_dict(), indent=2) + "\n")
