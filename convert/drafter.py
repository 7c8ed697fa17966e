"""Drafters: Apple's ReDrafter checkpoints, in the namings and files they are found in."""

from __future__ import annotations

import pathlib
import pickle
import re

import mlx.core as mx

from ..drafter import DrafterConfig, RecurrentDrafter, build_drafter, quantize_drafter, save_drafter
from ..errors import UserError
from ..files import read_json, read_safetensors, require_free, write_directory
from ..loading import fetch, one_line

WEIGHT_FILES = ("model.safetensors", "model.pt", "pytorch_model.bin")
_HEAD = r"(?:lm_head|lm_heads|lm_heads\.0|0)"
_BLOCK = re.compile(_HEAD + r"\.(\d+)\.linear\.(weight|bias)")
_OUTPUT = re.compile(_HEAD + r"\.(\d+)\.weight")
_INPUT = re.compile(r"(?:input_proj|input_projs|input_projs\.0)\.(weight|bias)")
_RECURRENCE = ("rnn_u.weight", "rnn_u.bias", "rnn_w.weight")


def convert_drafter(
    hf_path: str,
    mlx_path: str,
    quantize: bool = False,
    q_bits: int = 4,
    q_group_size: int = 64,
    dtype: str | None = None,
) -> pathlib.Path:
    """Converts a ReDrafter checkpoint to config.json + model.safetensors that `load` reads.

    Args:
        hf_path: local directory or Hub id with config.json and one of model.safetensors,
            model.pt, pytorch_model.bin.
        mlx_path: a directory that does not exist yet.
        quantize, q_bits, q_group_size: affine quantisation of all matrices.
        dtype: "float32", "float16" or "bfloat16"; None keeps the checkpoint's.

    Returns:
        the directory written.

    Raises:
        UserError: naming the file, key or tensor that is wrong; nothing is left behind.
    """
    require_free(mlx_path)
    source = fetch(hf_path, "--hf-path", patterns=["config.json", *WEIGHT_FILES])
    config_file = source / "config.json"
    config = DrafterConfig.from_dict(read_json(config_file), str(config_file))
    file, weights = _read_weights(source)
    drafter = build_drafter(config, rename(weights, config, str(file)), str(file))
    if dtype is not None:
        drafter.set_dtype(getattr(mx, dtype))
    if quantize:
        quantize_drafter(drafter, q_group_size, q_bits)
    mx.eval(drafter.parameters())
    with write_directory(mlx_path) as folder:
        save_drafter(drafter, folder)
    return pathlib.Path(mlx_path)


def rename(weights: dict[str, mx.array], config: DrafterConfig, source: str) -> dict[str, mx.array]:
    """Gives a checkpoint's tensors the names of `RecurrentDrafter` and splits input_proj.

    Its first hidden_size columns read the context, the others the recurrent state.

    Args:
        weights: under any of the namings lm_head.{i}.linear, lm_heads.*, 0.{i}.linear.
        source: for messages.

    Raises:
        UserError: a tensor that belongs to no drafter, or twice the same.
    """
    renamed: dict[str, mx.array] = {}

    def put(name: str, found: str, value: mx.array) -> None:
        if name in renamed:
            raise UserError(f"{source}: tensor {found!r} gives {name!r} a second time")
        renamed[name] = value

    for name, value in weights.items():
        if match := _BLOCK.fullmatch(name):
            put(f"blocks.{match[1]}.linear.{match[2]}", name, value)
        elif match := _OUTPUT.fullmatch(name):
            if int(match[1]) != config.num_draft_layers:
                raise UserError(
                    f"{source}: output layer {name!r} comes after {match[1]} blocks,"
                    f" but the config's num_draft_layers is {config.num_draft_layers}"
                )
            put("lm_head.weight", name, value)
        elif match := _INPUT.fullmatch(name):
            if match[1] == "bias":
                put("input_proj_context.bias", name, value)
            elif value.shape != (config.exit_dim, 2 * config.hidden_size):
                expected = (config.exit_dim, 2 * config.hidden_size)
                raise UserError(f"{source}: tensor {name!r} has shape {value.shape}, expected {expected}")
            else:
                put("input_proj_context.weight", name, value[:, : config.hidden_size])
                put("input_proj_state.weight", name, value[:, config.hidden_size :])
        elif name in _RECURRENCE:
            put(name, name, value)
        else:
            raise UserError(f"{source}: tensor {name!r} does not belong to a ReDrafter checkpoint")
    return renamed


def export_names(drafter: RecurrentDrafter) -> dict[str, mx.array]:
    """The tensors of an unquantised drafter under Apple's names, input_proj in one piece."""
    blocks = drafter.config.num_draft_layers
    weights = {f"lm_head.{blocks}.weight": drafter.lm_head.weight}
    for i, block in enumerate(drafter.blocks):
        weights[f"lm_head.{i}.linear.weight"] = block.linear.weight
        weights[f"lm_head.{i}.linear.bias"] = block.linear.bias
    if drafter.config.has_input_proj:
        halves = [drafter.input_proj_context.weight, drafter.input_proj_state.weight]
        weights["input_proj.weight"] = mx.concatenate(halves, axis=1)
        weights["input_proj.bias"] = drafter.input_proj_context.bias
    if drafter.config.rnn:
        weights["rnn_u.weight"], weights["rnn_u.bias"] = drafter.rnn_u.weight, drafter.rnn_u.bias
        weights["rnn_w.weight"] = drafter.rnn_w.weight
    return weights


def _read_weights(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, mx.array]]:
    for name in WEIGHT_FILES:
        file = folder / name
        if file.exists():
            return file, read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
    raise UserError(f"{folder}: none of {', '.join(WEIGHT_FILES)} is there")


def read_torch(file: pathlib.Path) -> dict[str, mx.array]:
    """The tensors of a PyTorch file, by PyTorch's safe loading: nothing in it is executed.

    Raises:
        UserError: PyTorch is not installed, or the file holds anything but tensors.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{file}: reading it needs PyTorch: pip install 'mlx-redrafter[torch]'") from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file}: holds something other than tensors, which is not loaded") from error
    except Exception as error:  # whatever is in the file, it is the user's
        raise UserError(f"{file}: not readable as a PyTorch file ({one_line(error)})") from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{file}: holds something other than named tensors")
    weights = {}
    for name, tensor in state.items():
        dtype = getattr(mx, str(tensor.dtype).removeprefix("torch."), None)
        if dtype is None or not tensor.is_floating_point():
            raise UserError(f"{file}: tensor {name!r} has type {tensor.dtype}, expected a floating-point type")
        weights[str(name)] = mx.array(tensor.float().numpy()).astype(dtype)
    return weights
