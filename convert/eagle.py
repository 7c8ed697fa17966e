"""EAGLE-3 heads under the names of their training codes (SafeAILab, SpecForge, speculators); and our own."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import mlx.core as mx
from mlx_redrafter.convert.source import lazy_weights, weight_files

from mlx_redrafter.drafting.cached.eagle import MODEL_TYPE, EagleConfig, EagleHead
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import read_json

# The layer is called midlayer, or layers.0; the map of draft tokens holds, for each, what to add for the target's id.
_LAYER = re.compile(r"(?:midlayer|layers\.0)\.(.+)")
_OFFSETS, _MASK = "d2t", "t2d"
_ARGS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
    "rope_theta", "rope_scaling", "max_position_embeddings", "attention_bias", "mlp_bias")  # fmt: skip
_AUX = "eagle_aux_hidden_state_layer_ids"


def read(source: pathlib.Path, scratch: pathlib.Path) -> EagleHead:
    """A head of lazy weights, published or ours. Raises UserError; `scratch` as for `lazy_weights`."""
    file = source / "config.json"
    fields, weights = read_json(file), lazy_weights(weight_files(source), scratch)
    if fields.get("model_type") != MODEL_TYPE:
        weights = rename(weights, str(source))
        fields = _fields(fields, weights, str(file))
        if fields["draft_vocab_size"] is None:
            weights.pop("vocab_map", None)
        elif "vocab_map" not in weights:
            raise UserError(f"{source}: tensor {_OFFSETS!r} is missing, which says which tokens are drafted")
    return EagleHead(EagleConfig.from_dict(fields, str(file))).fill(weights, str(source))


def rename(weights: dict[str, mx.array], source: str) -> dict[str, mx.array]:
    """Gives a published checkpoint's tensors the names of `EagleHead`. Raises UserError for one that comes twice."""
    renamed: dict[str, mx.array] = {}
    for found, value in weights.items():
        name = found.removeprefix("model.")
        if name == _MASK or name.endswith("rotary_emb.inv_freq"):
            continue
        if match := _LAYER.fullmatch(name):
            name = f"layer.{match[1]}"
        elif name == _OFFSETS:
            name, value = "vocab_map", (value + mx.arange(value.size)).astype(mx.int32)
        if name in renamed:
            raise UserError(f"{source}: tensor {found!r} comes twice, under two names")
        renamed[name] = value
    return renamed


def _fields(fields: dict[str, Any], weights: dict[str, mx.array], source: str) -> dict[str, Any]:
    """A published config as ours has it; what it does not say is told by the tensors."""
    for key in ("norm_before_fc", "fc_norm"):
        if fields.get(key):
            raise UserError(f"{source}: {key} is {fields[key]!r}; only heads without it can be read")
    args = fields.get("transformer_layer_config", fields)
    if not isinstance(args, dict):
        raise UserError(f"{source}: transformer_layer_config is {args!r}, expected an object")
    if (count := args.get("num_hidden_layers", 1)) != 1:
        raise UserError(f"{source}: num_hidden_layers is {count!r}, expected 1")
    layer = {key: args[key] for key in _ARGS if args.get(key) is not None}
    rope = args.get("rope_parameters")
    if isinstance(rope, dict):
        layer.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        if rope.get("rope_type", "default") != "default":
            layer.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    vocabulary, hidden = args.get("vocab_size"), args.get("hidden_size")
    drafted = fields.get("draft_vocab_size", vocabulary)
    return {
        "vocab_size": vocabulary,
        "hidden_size": fields.get("target_hidden_size") or hidden,
        "layer": layer,
        "draft_vocab_size": None if drafted == vocabulary and "vocab_map" not in weights else drafted,
        "context_layers": _context_layers(fields),
        "own_embedding": "embed_tokens.weight" in weights,
        "output_norm": "norm.weight" in weights,
        "norm_before_residual": bool(fields.get("norm_before_residual", False)),
    }


def _context_layers(fields: dict[str, Any]) -> list[int] | None:
    """By the number of layers passed: SpecForge counts the layers from 0 (`eagle_config`), speculators as we do."""
    nested = fields.get("eagle_config")
    if isinstance(nested, dict) and isinstance(found := nested.get(_AUX), list):
        return [n + 1 if isinstance(n, int) else n for n in found]
    return fields.get(_AUX)
