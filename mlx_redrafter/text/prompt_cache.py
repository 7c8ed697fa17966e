"""Prompt-cache files: mlx-lm's own format, checked before it is used and written whole."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache

from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.system.files import check_safetensors, replace_file
from mlx_redrafter.target.cache.kv_cache import cached


def load_cache_file(path: str | pathlib.Path, model: nn.Module, name: str) -> tuple[list[Any], dict[str, str]]:
    """Reads a prompt cache that mlx-lm or this program has written.

    Args:
        path: a .safetensors file.
        model: the model it has to fit.
        name: what the user calls the model; compared with the name in the file.

    Returns:
        mlx-lm caches and the file's metadata.

    Raises:
        UserError: no such file, a truncated one, or one of another model.
    """
    file = pathlib.Path(path)
    check_safetensors(file)
    try:
        cache, metadata = load_prompt_cache(str(file), return_metadata=True)
        metadata = dict(metadata or {})
    except Exception as error:  # whatever is in the file, it is the user's, not ours
        raise UserError(f"--prompt-cache-file {file}: not a prompt cache ({one_line(error)})") from error
    written_by = metadata.get("model")
    if written_by is not None and written_by != name:
        raise UserError(f"--prompt-cache-file {file}: was written for model {written_by}, expected {name}")
    expected = make_prompt_cache(model)
    if cached(cache) == 0:  # saved before anything was read
        return expected, metadata
    model(mx.zeros((1, 1), mx.int32), cache=expected)
    found, wanted = ([_shape(c) for c in caches] for caches in (cache, expected))
    if found != wanted:
        raise UserError(
            f"--prompt-cache-file {file}: is of another model: has {_words(found)}, expected {_words(wanted)}"
        )
    return cache, metadata


def save_cache_file(
    path: str | pathlib.Path, cache: list[Any], name: str, tokenizer_config: dict[str, Any], **facts: Any
) -> None:
    """Writes a prompt cache with what mlx-lm looks for in it, whole or not at all.

    Args:
        name: the model's directory or Hub id.
        tokenizer_config: what the tokenizer was loaded with.
        facts: more to keep, as JSON.
    """
    metadata = {"model": name, "tokenizer_config": json.dumps(tokenizer_config)}
    metadata |= {key: json.dumps(value) for key, value in facts.items()}
    with replace_file(pathlib.Path(path)) as file:
        try:
            save_prompt_cache(str(file), cache, metadata)
        except RuntimeError as error:  # what MLX makes of a full disk
            raise UserError(f"--prompt-cache-file {path}: cannot be written ({one_line(error)})") from error


def check_cache_name(path: str | pathlib.Path) -> None:
    """Raises UserError for a name that no cache could be saved under, before there is one to lose."""
    file = pathlib.Path(path)
    if file.suffix != ".safetensors":
        raise UserError(f"--prompt-cache-file {file}: expected a name that ends in .safetensors")
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"--prompt-cache-file {file}: its directory cannot be written")


def _shape(cache: Any) -> tuple[Any, ...]:
    """What has to agree between two caches of one layer: heads and widths, quantised or not."""
    keys: Any = getattr(cache, "keys", None)
    values: Any = getattr(cache, "values", None)
    if isinstance(keys, (tuple, list)):
        widths = [x[0].shape[-1] * 32 // cache.bits for x in (keys, values)]
        return (keys[0].shape[1], *widths)
    if isinstance(keys, mx.array) and isinstance(values, mx.array) and keys.ndim == 4:
        return (keys.shape[1], keys.shape[-1], values.shape[-1])
    return (type(cache).__name__,)


def _words(shapes: list[tuple[Any, ...]]) -> str:
    first = "x".join(map(str, shapes[0])) if shapes else "nothing"
    return f"{len(shapes)} layers of {first}"
