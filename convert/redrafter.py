"""ReDrafter checkpoints under the names that Apple's code gave them, in its several versions; and our own."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
from mlx_redrafter.convert.source import lazy_weights, weight_files

from mlx_redrafter.drafting.redrafter import DrafterConfig, RecurrentDrafter
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import read_json
from mlx_redrafter.system.weights import tensors

_HEAD = r"(?:lm_head|lm_heads|lm_heads\.0|0)"
_BLOCK = re.compile(_HEAD + r"\.(\d+)\.linear\.(weight|bias)")
_OUTPUT = re.compile(_HEAD + r"\.(\d+)\.weight")
_INPUT = re.compile(r"(?:input_proj|input_projs|input_projs\.0)\.(weight|bias)")
_RECURRENCE = ("rnn_u.weight", "rnn_u.bias", "rnn_w.weight")


def read_config(source: pathlib.Path) -> DrafterConfig:
    """The config of a drafter in either layout. Raises UserError."""
    file = source / "config.json"
    return DrafterConfig.from_dict(read_json(file), str(file))


def read(source: pathlib.Path, scratch: pathlib.Path) -> RecurrentDrafter:
    """A drafter of lazy weights from either layout. Raises UserError; `scratch` as for `lazy_weights`."""
    config, weights = read_config(source), lazy_weights(weight_files(source), scratch)
    if not is_converted(weights):
        weights = rename(weights, config, source)
    return RecurrentDrafter(config).fill(weights, str(source))


def is_converted(names: Iterable[str]) -> bool:
    """Whether tensors of these names are in our layout, in which some have names that Apple's never has."""
    return any(name.startswith(("blocks.", "lm_head.weight", "input_proj_", "vocab_map")) for name in names)


def rename(weights: dict[str, mx.array], config: DrafterConfig, source: pathlib.Path) -> dict[str, mx.array]:
    """Gives a checkpoint's tensors the names of `RecurrentDrafter` and splits input_proj.

    Its first hidden_size columns read the context, the others the recurrent state.

    Args:
        weights: under any of the namings lm_head.{i}.linear, lm_heads.*, 0.{i}.linear.
        source: for messages.

    Raises:
        UserError: a tensor that belongs to no drafter, is of another shape, or comes twice.
    """
    renamed: dict[str, mx.array] = {}
    expected = {name: value.shape for name, value in tensors(RecurrentDrafter(config)).items()}

    def put(name: str, found: str, value: mx.array) -> None:
        if name in renamed:
            raise UserError(f"{source}: tensor {found!r} gives {name!r} a second time")
        if value.shape != expected.get(name, value.shape):
            raise UserError(f"{source}: tensor {found!r} has shape {value.shape}, expected {expected[name]}")
        renamed[name] = value

    for name, value in sorted(weights.items()):
        if match := _BLOCK.fullmatch(name):
            put(f"blocks.{match[1]}.linear.{match[2]}", name, value)
        elif match := _OUTPUT.fullmatch(name):
            if int(match[1]) != config.num_draft_layers:
                but = f"but the config's num_draft_layers is {config.num_draft_layers}"
                raise UserError(f"{source}: output layer {name!r} comes after {match[1]} blocks, {but}")
            put("lm_head.weight", name, value)
        elif match := _INPUT.fullmatch(name):
            if match[1] == "bias":
                put("input_proj_context.bias", name, value)
            elif value.shape != (whole := (config.exit_dim, 2 * config.hidden_size)):
                raise UserError(f"{source}: tensor {name!r} has shape {value.shape}, expected {whole}")
            else:
                put("input_proj_context.weight", name, value[:, : config.hidden_size])
                put("input_proj_state.weight", name, value[:, config.hidden_size :])
        elif name in _RECURRENCE:
            put(name, name, value)
        else:
            raise UserError(f"{source}: tensor {name!r} does not belong to a ReDrafter checkpoint")
    return renamed


def published_form(drafter: RecurrentDrafter) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Config and tensors of an unquantised drafter under Apple's names, input_proj in one piece."""
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
    return drafter.config.to_dict() | {"num_lookback_tokens": 1}, weights
