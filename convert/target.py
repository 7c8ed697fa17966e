"""Targets: mlx-lm loads, casts and quantises lazily; the result is written a tensor at a time."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import sys
import tempfile
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model, quantize_model, save_config
from mlx_redrafter.convert.source import TORCH_PATTERNS, weight_files
from mlx_redrafter.convert.tokenizer import read_tokenizer
from mlx_redrafter.convert.torch_files import as_safetensors

from mlx_redrafter.drafting.drafter_files import check_quantization
from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.gguf import find_gguf, is_gguf, write_model
from mlx_redrafter.system.files import require_free, write_directory
from mlx_redrafter.system.hub import MODEL_PATTERNS, fetch
from mlx_redrafter.system.weights import save_weights, take_weights
from mlx_redrafter.text.checks import is_drafter, read_config
from mlx_redrafter.text.loading import DTYPES, open_model


def convert_target(
    hf_path: str,
    mlx_path: str,
    quantize: bool = False,
    q_bits: int = 4,
    q_group_size: int = 64,
    dtype: str | None = None,
    dequantize: bool = False,
    q_mode: str = "affine",
    q_recipe: str | None = None,
    trust_remote_code: bool = False,
    gguf_name: str | None = None,
) -> pathlib.Path:
    """Converts a Hugging Face model to an mlx-lm model.

    Args:
        hf_path: local directory or Hub id; safetensors or PyTorch files; or a GGUF file.
        mlx_path: a directory that does not exist yet.
        quantize, q_bits, q_group_size: affine quantisation, as in mlx-lm; one that is
            quantised already is dequantised first.
        dtype: of the weights that are not quantised; None keeps what the config says, or
            the weights' own.
        dequantize: write the weights of a quantised model in full.
        q_mode: "affine", or another of mlx-lm's, which has its own bits and group size.
        q_recipe: one of mlx-lm's mixed recipes, in place of q_bits.
        trust_remote_code: as in mlx-lm.
        gguf_name: which GGUF file, where hf_path has several.

    Returns:
        the directory written.

    Raises:
        UserError: naming the file or flag that is wrong; nothing is left behind.
    """
    require_free(mlx_path)
    if quantize and q_mode == "affine":
        check_quantization(q_bits, q_group_size)
    gguf = find_gguf(hf_path, "--hf-path", gguf_name) if is_gguf(hf_path, gguf_name) else None
    source = _fetch(hf_path) if gguf is None else gguf
    with write_directory(mlx_path) as folder, tempfile.TemporaryDirectory(dir=folder) as scratch:
        if gguf is not None and not quantize:
            print(f"{gguf}: {write_model(gguf, folder, dequantize, dtype)}", file=sys.stderr)
            return pathlib.Path(mlx_path)
        if gguf is not None:
            source = pathlib.Path(scratch) / "gguf"
            source.mkdir()
            print(f"{gguf}: {write_model(gguf, source, dequantize=True)}, to be quantised anew", file=sys.stderr)
        model, tokenizer, config = _load(source, pathlib.Path(scratch), trust_remote_code)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # mlx-lm's remarks
                if config.get("quantization") and (quantize or dequantize):
                    model = dequantize_model(model)
                    config.pop("quantization")
                    config.pop("quantization_config", None)
                _cast(model, config, dtype)
                if quantize:
                    bits, group = (q_bits, q_group_size) if q_mode == "affine" else (None, None)
                    recipe: Any = mixed_quant_predicate_builder(q_recipe, model, q_group_size) if q_recipe else None
                    model, config = quantize_model(model, config, group, bits, q_mode, quant_predicate=recipe)
        except Exception as error:  # whatever mlx-lm makes of the model
            raise UserError(f"{source}: mlx-lm cannot convert it: {one_line(error)}") from error
        weights = take_weights(model)
        if quantize and not any(name.endswith(".scales") for name in weights):
            raise UserError(f"--q-group-size is {q_group_size}, which divides no width of {source}")
        save_weights(folder, weights, "writing the target")
        _save_rest(source, folder, model, tokenizer, config)
    return pathlib.Path(mlx_path)


def _fetch(hf_path: str) -> pathlib.Path:
    """The source, of the Hub's two kinds of weights only the one to read."""
    source = fetch(hf_path, "--hf-path")
    if not any(source.glob("model*.safetensors")) and not pathlib.Path(hf_path).expanduser().is_dir():
        source = fetch(hf_path, "--hf-path", [*MODEL_PATTERNS, *TORCH_PATTERNS])
    return source


def _load(
    source: pathlib.Path, scratch: pathlib.Path, trust_remote_code: bool
) -> tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """Model of lazy weights, tokenizer and config. Raises UserError."""
    if is_drafter(read_config(source)):
        raise UserError(f"{source}: is a drafter; use `mlx-redrafter convert drafter`")
    readable = source
    if (files := weight_files(source))[0].suffix != ".safetensors":
        as_safetensors(files, scratch)
        for name in ("config.json", "generation_config.json"):
            if (source / name).exists():
                shutil.copy(source / name, scratch)
        readable = scratch
    model, config = open_model(readable, trust_remote_code)
    tokenizer = read_tokenizer(source, scratch, config, trust_remote_code)
    return model, tokenizer, config


def _cast(model: nn.Module, config: dict[str, Any], dtype: str | None) -> None:
    """Gives the weights the type asked for, or else the config's, as mlx-lm's conversion does."""
    if dtype is None:
        dtype = config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
        if dtype not in DTYPES:
            return
    else:
        config |= {key: dtype for key in ("torch_dtype", "dtype") if key in config}
    wanted = getattr(mx, dtype)
    may_cast = getattr(model, "cast_predicate", lambda name: True)

    def cast(name: str, value: mx.array) -> mx.array:
        return value.astype(wanted) if may_cast(name) and mx.issubdtype(value.dtype, mx.floating) else value

    model.update(tree_map_with_path(cast, model.parameters()))


def _save_rest(
    source: pathlib.Path, folder: pathlib.Path, model: nn.Module, tokenizer: TokenizerWrapper, config: dict[str, Any]
) -> None:
    """Everything but the weights."""
    vision = {"keep_vision_config": True} if "vision_tower" in getattr(model, "model", {}) else {}
    save_config(config, folder / "config.json", **vision)
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library has no OSError for a full disk
        raise UserError(f"{folder.parent}: the tokenizer cannot be written ({one_line(error)})") from error
    for pattern in ("*.py", "generation_config.json", "tokenizer.model"):
        for file in source.glob(pattern):
            shutil.copy(file, folder)
