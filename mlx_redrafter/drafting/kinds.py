"""All kinds of drafters there are: which one a directory holds, and what proposes with it."""

from __future__ import annotations

import pathlib
from typing import TypeAlias

from mlx_redrafter.drafting import medusa, redrafter
from mlx_redrafter.drafting.medusa import MedusaHeads, load_medusa
from mlx_redrafter.drafting.redrafter import RecurrentDrafter, load_drafter
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import read_json

Drafter: TypeAlias = RecurrentDrafter | MedusaHeads


def open_drafter(path: str | pathlib.Path) -> Drafter:
    """Reads a drafter of the kind that its config.json says.

    Raises:
        UserError: naming the missing or damaged file, key or tensor.
    """
    file = pathlib.Path(path) / "config.json"
    if not file.exists() and (file.parent / "adapter_config.json").exists():
        raise UserError(f"{path}: is an adapter, not a drafter; use it with --model TARGET --adapter-path {path}")
    fields = read_json(file)
    if fields.get("model_type") == medusa.MODEL_TYPE and "vocab_size" in fields:
        return load_medusa(path)
    if "medusa_num_heads" in fields:
        raise UserError(f"{file}: Medusa heads as published; run `mlx-redrafter convert drafter` on them first")
    if (kind := fields.get("model_type", redrafter.MODEL_TYPE)) != redrafter.MODEL_TYPE:
        raise UserError(
            f"{path}: is a model of type {kind!r}, not a drafter; use it with --model {path}"
            f" (`mlx-redrafter train --model {path} --out NEW` makes a drafter for it)"
        )
    return load_drafter(path)
