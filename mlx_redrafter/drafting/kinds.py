"""All kinds of drafters there are: which one a directory holds, and what proposes with it."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any, TypeAlias

from mlx_redrafter.drafting import redrafter
from mlx_redrafter.drafting.cached import eagle
from mlx_redrafter.drafting.cached.draft_model import DraftModel
from mlx_redrafter.drafting.cached.eagle import EagleConfig, EagleHead
from mlx_redrafter.drafting.cached.head import ContextReader
from mlx_redrafter.drafting.cached.mtp import MtpConfig, MtpHead
from mlx_redrafter.drafting.cached.proposer import CachedProposer, PrefixProposer
from mlx_redrafter.drafting.drafter_files import Embedder, read_fields
from mlx_redrafter.drafting.medusa import MedusaConfig, MedusaHeads
from mlx_redrafter.drafting.proposers import MedusaProposer, Proposer, RecurrentProposer
from mlx_redrafter.drafting.redrafter import DrafterConfig, RecurrentDrafter
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import read_safetensors

Drafter: TypeAlias = RecurrentDrafter | MedusaHeads | DraftModel | EagleHead | MtpHead
# Beside the recurrent one: config, head, and a key that tells ours from published ones of the same type.
KINDS: tuple[tuple[Any, Any, str], ...] = (
    (MedusaConfig, MedusaHeads, "vocab_size"),
    (EagleConfig, EagleHead, "layer"),
    (MtpConfig, MtpHead, "model_type"),
)


def proposer_for(
    drafter: Drafter | None, embed: Embedder, temperature: float = 1.0, text: Sequence[int] = ()
) -> Proposer:
    """What proposes with a drafter; nothing without one.

    Args:
        embed: the target's embedding.
        temperature: of the drafter's probabilities, by which nodes are chosen.
        text: all tokens before the first step, where they are known; for drafters that read tokens alone.
    """
    if drafter is None:
        return Proposer()
    if isinstance(drafter, (DraftModel, ContextReader)):
        return CachedProposer(drafter, temperature, text)
    if isinstance(drafter, MedusaHeads):
        return MedusaProposer(drafter)
    if drafter.config.prefix_window:
        return PrefixProposer(drafter, embed, temperature)
    return RecurrentProposer(drafter, embed, temperature)


def is_eagle(fields: dict[str, Any]) -> bool:
    """Whether a config.json is that of an EAGLE-3 head, converted or not."""
    kind = fields.get("model_type")
    return kind == eagle.MODEL_TYPE or (kind != redrafter.MODEL_TYPE and "draft_vocab_size" in fields)


def open_drafter(path: str | pathlib.Path) -> RecurrentDrafter | MedusaHeads | EagleHead | MtpHead:
    """Reads what `DrafterBase.save` wrote, of the kind that its config.json says.

    Raises:
        UserError: naming the missing or damaged file, key or tensor.
    """
    file, weights_file = pathlib.Path(path) / "config.json", pathlib.Path(path) / "model.safetensors"
    fields = read_fields(file.parent)
    for config, head, ours in KINDS:
        if fields.get("model_type") == config.model_type and ours in fields:
            return head(config.from_dict(fields, str(file))).fill(read_safetensors(weights_file), str(weights_file))
    if "medusa_num_heads" in fields:
        raise UserError(f"{file}: Medusa heads as published; run `mlx-redrafter convert drafter` on them first")
    if is_eagle(fields):
        raise UserError(f"{file}: an EAGLE-3 head as published; run `mlx-redrafter convert drafter` on it first")
    if (kind := fields.get("model_type", redrafter.MODEL_TYPE)) != redrafter.MODEL_TYPE:
        raise UserError(
            f"{path}: is a model of type {kind!r}, not a drafter; use it with --model {path}"
            f" (`mlx-redrafter train --model {path} --out NEW` makes a drafter for it)"
        )
    drafter, weights = RecurrentDrafter(DrafterConfig.from_dict(fields, str(file))), read_safetensors(weights_file)
    if any(name.startswith(("lm_head.0.", "0.0.", "lm_heads.", "input_proj.", "input_projs.")) for name in weights):
        raise UserError(f"{weights_file}: Hugging Face layout; run `mlx-redrafter convert drafter` on it first")
    return drafter.fill(weights, str(weights_file))
