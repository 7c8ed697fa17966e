"""Whether a drafter fits a target, and what it shares with it; knows nothing of files or steps."""

from __future__ import annotations

from mlx_redrafter.drafting.cached.draft_model import DraftModel
from mlx_redrafter.drafting.cached.head import ContextReader
from mlx_redrafter.drafting.drafter_files import ScoringDrafter
from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.output_layer import output_layer


def check_pair(target: Target, drafter: Drafter, name: str = "drafter") -> None:
    """Ties the drafter to the target where its config says so.

    Raises:
        UserError: the drafter was made for a target of another shape.
    """
    if isinstance(drafter, ContextReader):
        drafter.fit(target)
    check_sizes(target, drafter, name)
    if isinstance(drafter, ScoringDrafter):
        tie(drafter, target)


def check_sizes(target: Target, drafter: Drafter, name: str) -> None:
    """Raises UserError where the drafter was made for a target of another shape; models fit by their tokenizers."""
    if isinstance(drafter, DraftModel):
        return
    for field in ("hidden_size", "vocab_size"):
        found, expected = getattr(drafter.config, field), getattr(target, field)
        if found != expected:
            known = (drafter.config.target_fingerprint or {}).get("name", "another model")
            raise UserError(f"{name}: {field} is {found}, but the target's is {expected}; it was made for {known}")
    target.check_layers(drafter.context_layers, name)


def tie(drafter: ScoringDrafter, target: Target) -> None:
    """Gives a drafter with `tie_output` the target's layer, once; others stay as they are.

    Raises:
        UserError: see `output_layer`.
    """
    if not hasattr(drafter, "lm_head"):
        drafter.take("lm_head", output_layer(target, drafter.get("vocab_map")))
