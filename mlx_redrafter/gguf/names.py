"""Which tensor of a GGUF file is which parameter of mlx-lm's model, by gguf's table of names."""

from __future__ import annotations

import json
import pathlib
import re
import tempfile
from typing import Any

import gguf
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.gguf.architectures import architecture
from mlx_redrafter.gguf.file import GGUF, Tensor
from mlx_redrafter.gguf.rope import FACTOR_TENSORS

_EXPERTS = re.compile(r"\.(?:mlp|block_sparse_moe)\.switch_mlp\.")  # mlx-lm's words; gguf knows transformers'


def parameters(file: GGUF, config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensor of every parameter, in the model's order.

    Args:
        config: of the unquantised model.

    Raises:
        UserError: a tensor is missing, has another shape than the model's, or belongs to no parameter.
    """
    # Of the last layer, before a table of all the layers that a damaged file claims to have.
    file.tensor(f"blk.{config['num_hidden_layers'] - 1}.attn_norm.weight")
    kinds = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    name_of = gguf.get_tensor_name_map(kinds[file.metadata["general.architecture"]], config["num_hidden_layers"])
    found: dict[str, Tensor] = {}
    for parameter, shape in _shapes(file, config).items():
        name = name_of.get_name(_EXPERTS.sub(".mlp.experts.", parameter), try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"{file.path}: mlx-lm's {parameter} has no name in GGUF files")
        tensor = file.tensor(name)
        if tensor.shape != shape:
            raise UserError(f"{file.path}: tensor {name!r} has the shape {tensor.shape}, expected {shape}")
        found[parameter] = tensor
    used = {tensor.name for tensor in found.values()} | set(FACTOR_TENSORS)
    if left := sorted(file.tensors.keys() - used):
        raise UserError(
            f"{file.path}: tensor {left[0]!r} belongs to nothing in mlx-lm's {config['model_type']}"
            + (f", nor do {len(left) - 1} more" if len(left) > 1 else "")
        )
    return found


def row_order(file: GGUF, tensor: Tensor, config: dict[str, Any]) -> np.ndarray | None:
    """The row of the file for each row of the model; None where they are the same.

    llama.cpp rotates neighbouring rows of a head together, transformers and mlx-lm each row of the
    first half of a head with its counterpart in the second. The rows of q and k differ accordingly.
    """
    if not architecture(file).permuted:
        return None
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    kind = tensor.name.split(".")[-2]
    if kind not in heads:
        return None
    count = tensor.shape[0]
    return np.arange(count).reshape(config[heads[kind]], -1, 2).swapaxes(1, 2).reshape(count)


def is_shifted(file: GGUF, tensor: Tensor) -> bool:
    """Whether llama.cpp has added 1 to it."""
    return architecture(file).shifted_norms and tensor.name.endswith("norm.weight")


def _shapes(file: GGUF, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all parameters of mlx-lm's model, none of which is ever computed."""
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
        try:
            model, _ = load_model(pathlib.Path(folder), lazy=True, strict=False)
        except Exception as error:  # whatever mlx-lm makes of the config
            raise UserError(f"{file.path}: mlx-lm has no model for it: {one_line(error)}") from error
    return {name: value.shape for name, value in tree_flatten(model.parameters())}  # type: ignore[misc, union-attr, str-unpack]
