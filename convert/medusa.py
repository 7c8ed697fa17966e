"""Medusa heads: published checkpoints (medusa_lm_head.pt or .safetensors), and our own."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import mlx.core as mx
from mlx_redrafter.convert.source import lazy_weights, weight_files

from mlx_redrafter.drafting.drafter_files import whole_number
from mlx_redrafter.drafting.medusa import MODEL_TYPE, MedusaConfig, MedusaHeads
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import read_json

WEIGHT_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
# Head h is a sequence: residual blocks 0, 1, ..., then the output layer.
_BLOCK = re.compile(r"(?:medusa_head\.)?(\d+)\.(\d+)\.linear\.(weight|bias)")
_OUTPUT = re.compile(r"(?:medusa_head\.)?(\d+)\.(\d+)\.weight")


def read(source: pathlib.Path, scratch: pathlib.Path) -> MedusaHeads:
    """Heads of lazy weights, published or ours. Raises UserError; `scratch` as for `lazy_weights`."""
    file = source / "config.json"
    fields, published = read_json(file), published_files(source)
    if not published:
        if fields.get("model_type") != MODEL_TYPE or "vocab_size" not in fields:
            raise UserError(f"{source}: no weights; expected {' or '.join(WEIGHT_FILES)}")
        weights = lazy_weights(weight_files(source), scratch)
        return MedusaHeads(MedusaConfig.from_dict(fields, str(file))).fill(weights, str(source))
    weights = lazy_weights(published, scratch)
    config = _published_config(fields, weights, str(file))
    return MedusaHeads(config).fill(rename(weights, config, str(published[0])), str(published[0]))


def published_files(source: pathlib.Path) -> list[pathlib.Path]:
    """The one weight file of a published checkpoint, if it is there."""
    return [source / name for name in WEIGHT_FILES if (source / name).exists()][:1]


def _published_config(fields: dict[str, Any], weights: dict[str, mx.array], source: str) -> MedusaConfig:
    """Published configs name the target and not its sizes, which the output layers' shapes tell."""
    layers = whole_number({"medusa_num_layers": 1} | fields, "medusa_num_layers", 0, source)
    for name, value in weights.items():
        if (match := _OUTPUT.fullmatch(name)) and int(match[2]) == layers and value.ndim == 2:
            sizes = {"vocab_size": value.shape[0], "hidden_size": value.shape[1]}
            return MedusaConfig.from_dict(fields | sizes, source)
    found = f"tensors are called {', '.join(sorted(weights)[:3])}, ..."
    where = f"after {layers} residual blocks of a head (medusa_num_layers)"
    raise UserError(f"{source}: no output layer was found {where}; {found}")


def rename(weights: dict[str, mx.array], config: MedusaConfig, source: str) -> dict[str, mx.array]:
    """Gives a published checkpoint's tensors the names of `MedusaHeads`.

    A checkpoint may hold more heads than the config speaks of, which are left out.

    Raises:
        UserError: a tensor that belongs to no head.
    """
    renamed = {}
    for name, value in weights.items():
        if match := _BLOCK.fullmatch(name):
            new = f"heads.{match[1]}.blocks.{match[2]}.linear.{match[3]}"
        elif (match := _OUTPUT.fullmatch(name)) and int(match[2]) == config.medusa_num_layers:
            new = f"heads.{match[1]}.lm_head.weight"
        else:
            raise UserError(f"{source}: tensor {name!r} does not belong to Medusa heads of this config")
        if int(match[1]) < config.medusa_num_heads:
            renamed[new] = value
    return renamed


def published_form(heads: MedusaHeads) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Config and tensors of unquantised heads under the names of a published checkpoint."""
    weights: dict[str, mx.array] = {}
    for h, head in enumerate(heads.heads):
        for b, block in enumerate(head.blocks):
            weights |= {f"{h}.{b}.linear.{name}": value for name, value in block.linear.parameters().items()}
        weights[f"{h}.{len(head.blocks)}.weight"] = head.lm_head.weight
    sizes = ("vocab_size", "hidden_size")  # which published configs do not name
    return {key: value for key, value in heads.config.to_dict().items() if key not in sizes}, weights
