"""PyTorch weight files as safetensors files, a tensor at a time and without running what is in them."""

from __future__ import annotations

import pathlib
import pickle
from typing import Any

from tqdm import tqdm

from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.system.weights import ITEM_BYTES, TYPES, find_weights, require_space, write_safetensors


def find_torch_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """model.pt, or pytorch_model.bin, whole or in shards. Raises UserError as `find_weights` does."""
    if (single := folder / "model.pt").exists():
        return [single]
    return find_weights(folder, "pytorch_model", ".bin")


def as_safetensors(files: list[pathlib.Path], folder: pathlib.Path) -> list[pathlib.Path]:
    """The same tensors, bit for bit, in safetensors files of the same number in `folder`.

    The files are mapped, not read whole, where PyTorch can (since its 1.6).

    Raises:
        UserError: PyTorch is not installed, or a file holds anything but named tensors.
    """
    require_space(folder, sum(file.stat().st_size for file in files))
    written = []
    with tqdm(total=len(files), desc="reading PyTorch files", unit="file", disable=None) as bar:
        for i, file in enumerate(files, 1):
            written.append(folder / f"model-{i:05d}-of-{len(files):05d}.safetensors")
            _write(file, _load(file), written[-1])
            bar.update(1)
    return written


def _load(file: pathlib.Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{file}: reading it needs PyTorch: pip install 'mlx-redrafter[torch]'") from error
    try:
        mapped = file.open("rb").read(2) == b"PK"  # a zip file; the older format cannot be mapped
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file}: holds something other than tensors, which is not loaded") from error
    except Exception as error:  # whatever is in the file, it is the user's
        raise UserError(f"{file}: not readable as a PyTorch file ({one_line(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file}: holds something other than named tensors")
    return {str(name): value for name, value in state.items()}


def _write(file: pathlib.Path, state: dict[str, Any], out: pathlib.Path) -> None:
    import torch

    shapes = {}
    for name, tensor in state.items():
        dtype = TYPES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            known = ", ".join(sorted(TYPES))
            raise UserError(f"{file}: tensor {name!r} has type {tensor.dtype}, expected one of {known}")
        assert tensor.element_size() == ITEM_BYTES[dtype]
        shapes[name] = (dtype, tuple(tensor.shape))

    def read(name: str) -> bytes | memoryview:
        flat = state.pop(name).contiguous().reshape(-1)
        return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b""

    write_safetensors(out, shapes, read, lambda count: None, "pt")
