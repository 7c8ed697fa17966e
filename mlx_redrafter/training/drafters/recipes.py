"""Recipes: what `mlx-redrafter train` takes for the flags that are not given.

Knows nothing of what a flag does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from mlx_redrafter.errors import UserError
from mlx_redrafter.target.model import Target
from mlx_redrafter.training.drafters.kinds import METHODS

# Of the drafter itself: one that --init names has them already.
SHAPE = (
    *("exit_dim", "num_draft_layers", "no_rnn", "context_layers", "prefix_window", "prefix_layers"),
    *("output_norm", "draft_vocab_size", "output_layer"),
)


def quarters(layers: int) -> list[int]:
    """A quarter, a half, three quarters and all of so many layers."""
    return sorted({max(1, round(layers * n / 4)) for n in (1, 2, 3, 4)})


def _quarters(args: argparse.Namespace, target: Target) -> list[int] | None:
    """Those of a target's layers; None where hidden states between them hide, or the method has its own."""
    if args.method == "eagle":
        return None
    layers = quarters(target.num_layers)
    try:
        target.check_layers(tuple(layers), "")
    except UserError:
        return None
    return layers if target.num_layers else None


def _tied(args: argparse.Namespace, target: Target) -> str | None:
    """The target's own output layer, where the drafter can have it."""
    return "tied" if args.method in ("redrafter", "eagle") and args.exit_dim in (None, target.hidden_size) else None


def _shares(*first: float) -> Callable[[argparse.Namespace, Target], list[float]]:
    """These shares of positions for the first draft steps, the last one for those after them."""

    def of(args: argparse.Namespace, target: Target) -> list[float]:
        steps = args.beam_length - 1
        return [*first, *[first[-1]] * steps][:steps]

    return of


# Values by the flags' names in argparse, or functions of the flags and the target.
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rich": {
        "context_layers": _quarters,
        "prefix_window": 256,
        "output_norm": True,
        "output_layer": _tied,
        "loss_vocab": 4096,
        "learn_prompts": True,
        "step_shares": _shares(0.74, 0.4, 0.25, 0.15),
        "batch_size": 4,
        "learning_rate": 1.5e-3,
    },
    "apple": {
        "exit_dim": lambda args, target: 2 * target.hidden_size,
        "output_layer": "random",
        "loss": "text",
        "step_shares": _shares(1.0),
    },
}
USUAL = "rich"


def follow(args: argparse.Namespace, target: Target | None = None) -> None:
    """Fills in the flags that were not given, as far as they apply to the method and to what --init names.

    Args:
        target: None as long as it is not known; what depends on it is then left as it is.
    """
    given = {*getattr(args, "given", ()), *METHODS[args.method].foreign, *(SHAPE if args.init else ())}
    for name, value in RECIPES[args.recipe].items():
        if name not in given and not (callable(value) and target is None):
            setattr(args, name, value(args, target) if callable(value) else value)


def fixed(recipe: str, method: str) -> dict[str, Any]:
    """What a recipe takes for a method, whatever the target."""
    foreign = METHODS[method].foreign
    return {name: value for name, value in RECIPES[recipe].items() if not callable(value) and name not in foreign}
