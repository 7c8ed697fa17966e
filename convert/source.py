"""What a conversion reads: safetensors files as they are, PyTorch files by way of a scratch folder."""

from __future__ import annotations

import pathlib

import mlx.core as mx
from mlx_redrafter.convert.torch_files import as_safetensors, find_torch_files

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.weights import find_weights, read_weights

TORCH_PATTERNS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
EXPECTED = "model.safetensors, model.pt, pytorch_model.bin, or either kind in shards with its index"


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The weight files of a directory; safetensors where there are both. Raises UserError where there are none."""
    if files := find_weights(folder) or find_torch_files(folder):
        return files
    raise UserError(f"{folder}: no weights; expected {EXPECTED}")


def lazy_weights(files: list[pathlib.Path], scratch: pathlib.Path) -> dict[str, mx.array]:
    """All tensors of a checkpoint's files, lazy.

    Args:
        scratch: a folder for PyTorch's files as safetensors; it has to outlive the arrays' evaluation.

    Raises:
        UserError: naming the file or tensor that is missing or wrong.
    """
    return read_weights(files if files[0].suffix == ".safetensors" else as_safetensors(files, scratch))
