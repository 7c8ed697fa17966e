"""Back to the Hugging Face layout, bit for bit where nothing is quantised."""

from __future__ import annotations

import pathlib
from typing import Any

from mlx_lm.utils import dequantize_model, save_config
from mlx_redrafter.convert.drafter import export_drafter
from mlx_redrafter.convert.tokenizer import copy_small_files

from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.system.files import require_free, write_directory
from mlx_redrafter.system.hub import fetch
from mlx_redrafter.system.weights import save_weights, take_weights
from mlx_redrafter.text.checks import is_drafter, read_config
from mlx_redrafter.text.loading import open_model


def export(mlx_path: str, hf_path: str, dequantize: bool = False, trust_remote_code: bool = False) -> pathlib.Path:
    """Writes a target as transformers reads it, or a drafter under the names of Apple or Medusa.

    Args:
        mlx_path: local directory or Hub id of a converted target or drafter.
        hf_path: a directory that does not exist yet.
        dequantize: write quantised weights in full; without it they are refused.

    Returns:
        the directory written: config.json, model.safetensors (or shards and their index),
        and for a target its tokenizer.

    Raises:
        UserError: quantised weights, or a target whose tensors mlx-lm has renamed or reshaped
            so that transformers would not find them; nothing is left behind.
    """
    require_free(hf_path)
    source = fetch(mlx_path, "--mlx-path")
    fields = read_config(source)
    if (fields.get("quantization") or fields.get("quantization_config")) and not dequantize:
        raise UserError(f"{source}: is quantised, for which this layout has no form; --dequantize writes it in full")
    with write_directory(hf_path) as folder:
        if is_drafter(fields):
            export_drafter(source, folder)
        else:
            _export_target(source, folder, trust_remote_code)
    return pathlib.Path(hf_path)


def _export_target(source: pathlib.Path, folder: pathlib.Path, trust_remote_code: bool) -> None:
    model, config = open_model(source, trust_remote_code)
    try:
        model = dequantize_model(model)
    except Exception as error:  # whatever mlx-lm makes of the files
        raise UserError(f"{source}: mlx-lm cannot dequantise it: {one_line(error)}") from error
    weights = take_weights(model)
    for name in ("quantization", "quantization_config"):
        config.pop(name, None)
    save_config(config, folder / "config.json")
    _check_layout(source, folder, {name: value.shape for name, value in weights.items()})
    save_weights(folder, weights, "writing the target", kind="pt")
    copy_small_files(source, folder)


def _check_layout(source: pathlib.Path, folder: pathlib.Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError unless transformers' model of this config has tensors of these names and shapes."""
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise UserError(f"{source}: exporting a target needs PyTorch: pip install 'mlx-redrafter[torch]'") from error
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except Exception as error:  # whatever transformers makes of the config
        raise UserError(f"{source}: transformers has no such model: {one_line(error)}") from error
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, shape in shapes.items():
        if name not in expected:
            what = f"transformers has no tensor {name!r}; mlx-lm names this architecture's otherwise"
            raise UserError(f"{source}: {what}")
        if shape != expected[name]:
            raise UserError(f"{source}: tensor {name!r} has shape {shape}, but transformers' has {expected[name]}")
    if missing := sorted(expected.keys() - shapes.keys() - _tied(model)):
        raise UserError(f"{source}: tensor {missing[0]!r} of transformers' model is not there")


def _tied(model: Any) -> set[str]:
    """Tensors that are another one under a second name, and so need not be in a file."""
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name for name, value in named if first.setdefault(id(value), name) != name}
