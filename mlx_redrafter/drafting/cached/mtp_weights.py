"""Finds a multi-token-prediction layer among a model's tensors, whatever its family calls it.

| family | in front of the names | F; norm_e, norm_h, norm |
|---|---|---|
| DeepSeek-V3, GLM-4 MoE | model.layers.N, N the number of layers | eh_proj; enorm, hnorm, shared_head.norm |
| MiMo | model.mtp_layers.0 | input_proj, h before e; token_layernorm, hidden_layernorm, final_layernorm |
| Qwen3-Next, Qwen3.5 | mtp, and mtp.layers.0 for the layer | fc; pre_fc_norm_embedding, pre_fc_norm_hidden, norm |

mlx-lm drops them all when it loads a model, and so when it converts one. What becomes of the layer's tensors, as of
stacked experts, is left to its own code. Of several layers the first one is read. Knows nothing of drafting.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from mlx_redrafter.drafting.cached.mtp import MtpConfig, MtpHead, body_of
from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.system.files import check_safetensors, read_safetensors
from mlx_redrafter.system.weights import find_weights, read_index

MISSING = (
    "has no multi-token-prediction layer, which conversions leave out: `mlx-redrafter convert drafter --hf-path"
    " ORIGINAL --mlx-path NEW` makes a drafter of the original model's, where that has one, for --draft NEW"
)
_FIRST = re.compile(r"(?:(model\.layers\.(\d+)\.)eh_proj|(model\.mtp_layers\.0\.)input_proj|(mtp\.)fc)\.weight")
_NORMS = ("norm", "embedding_norm", "context_norm")
_NAMES = {"eh_proj": "fc", "input_proj": "fc"}
_NAMES |= dict.fromkeys(("shared_head.norm", "final_layernorm"), _NORMS[0])
_NAMES |= dict.fromkeys(("enorm", "token_layernorm", "pre_fc_norm_embedding"), _NORMS[1])
_NAMES |= dict.fromkeys(("hnorm", "hidden_layernorm", "pre_fc_norm_hidden"), _NORMS[2])
_SHARED = ("embed_tokens.", "shared_head.head.")  # copies of the target's
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(.+)")
_LAYER = "model.layers.0."


def places(folder: pathlib.Path) -> dict[str, str]:
    """The layer's tensors in a model's directory and the files that hold them; none where it has no such layer.

    Raises:
        UserError: a weight file or its index is missing or damaged.
    """
    index = folder / "model.safetensors.index.json"
    files = {} if index.exists() else {file: check_safetensors(file) for file in find_weights(folder)}
    named = read_index(index) if index.exists() else {name: file.name for file, n in files.items() for name in n}
    prefix = _prefix(named)
    return {} if prefix is None else {name: file for name, file in named.items() if name.startswith(prefix)}


def read_layer(folder: pathlib.Path, fields: dict[str, Any]) -> MtpHead:
    """The layer in a model's own directory, of lazy weights.

    Args:
        folder: with at least the files that `places` names.
        fields: its config.json, rope under the names that mlx-lm reads.

    Raises:
        UserError: there is none, or mlx-lm has no such layer.
    """
    found, text = places(folder), fields.get("text_config") or {}
    if not found:
        raise UserError(f"{folder}: {MISSING}")
    whole = fields | text | {"model_type": fields.get("model_type")}
    model = {key: value for key, value in whole.items() if not isinstance(value, dict) or key.startswith("rope")}
    sizes = {key: model[key] for key in ("vocab_size", "hidden_size") if key in model}
    config = MtpConfig.from_dict({"model": model} | sizes, str(folder / "config.json"))
    weights = {
        name: value
        for file in sorted(set(found.values()))
        for name, value in read_safetensors(folder / file).items()
        if name in found
    }
    try:
        weights = _arranged(_renamed(weights), config)
    except Exception as error:  # of mlx-lm's code, which expects tensors that may not be there
        raise UserError(f"{folder}: mlx-lm cannot read its multi-token-prediction layer: {one_line(error)}") from error
    return MtpHead(config).fill(weights, str(folder))


def _prefix(names: Iterable[str]) -> str | None:
    """What stands in front of the first layer's names; None where there is no layer."""
    found = [match for name in names if (match := _FIRST.fullmatch(name))]
    first = min(found, key=lambda match: int(match[2] or 0), default=None)
    return None if first is None else first[1] or first[3] or first[4]


def _renamed(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The tensors under the names of `MtpHead`, those of the layer without a prefix."""
    prefix, found = _prefix(weights), dict[str, mx.array]()
    assert prefix is not None
    for full, value in weights.items():
        name = full.removeprefix(prefix).removeprefix("layers.0.")
        stem, dot, kind = name.rpartition(".")
        if not name.startswith(_SHARED) and not re.match(r"layers\.\d", name):
            found[_NAMES.get(stem, stem) + dot + kind] = value
    if prefix + "input_proj.weight" in weights:  # reads the hidden state first
        hidden, embedding = mx.split(found["fc.weight"], 2, axis=1)
        found["fc.weight"] = mx.concatenate([embedding, hidden], axis=1)
    return found


def _arranged(weights: dict[str, mx.array], config: MtpConfig) -> dict[str, mx.array]:
    """The tensors as mlx-lm arranges those of a model with this one layer, under the names of `MtpHead`."""
    family = config.family
    norms = mx.concatenate([weights.pop(f"{name}.weight") for name in _NORMS])
    given = {_LAYER + name: value for name, value in weights.items()}
    # All norms are of the family's kind: some are stored as what is to be added to 1. One with windows of convolution
    # as transformers has them is told by those, of which this layer has none.
    given |= {"model.norm.weight": norms, f"{_LAYER}conv1d.weight": mx.zeros((1, 1, 2))}
    body, found = body_of(family), dict[str, mx.array]()
    experts: dict[str, dict[int, mx.array]] = {}
    for full, value in family.sanitize(given).items():
        name = full.removeprefix(f"{body}.")
        if name == "norm.weight":
            norm, embedding, context = mx.split(value, 3)
            found |= {"body.norm.weight": norm, "embedding_norm.weight": embedding, "context_norm.weight": context}
        elif match := _EXPERT.fullmatch(name):
            experts.setdefault(f"body.{match[1]}.switch_mlp.{match[3]}", {})[int(match[2])] = value
        elif name != "layers.0.conv1d.weight":
            found[f"body.{name}" if not name.endswith(".fc.weight") else "fc.weight"] = value
    return found | {name: mx.stack([each[i] for i in range(len(each))]) for name, each in experts.items()}
