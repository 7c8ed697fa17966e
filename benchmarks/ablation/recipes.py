"""Names recipes of training: flags of `mlx-redrafter train` that differ in one thing from the recipe before.

Knows nothing of how a recipe is followed.
"""

from __future__ import annotations

import dataclasses
import shlex

from mlx_redrafter.errors import UserError
from mlx_redrafter.training.drafters.recipes import quarters

LAYERS = "LAYERS"  # in flags: a quarter, a half, three quarters and all of the target's layers
OLD = ("--step-shares", "1", "0.48", "0.29", "0.19")
TAPS = (*OLD, "--context-layers", LAYERS)
PREFIX = (*TAPS, "--prefix-window", "256")
NORM = (*PREFIX, "--output-norm")
PROMPTS = (*NORM, "--learn-prompts", "--loss-vocab", "4096")
RICH = ("--recipe", "rich")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A way to train.

    Args:
        name: for the table and the command line.
        flags: of `mlx-redrafter train`.
        words: what is different, for people.
    """

    name: str
    flags: tuple[str, ...]
    words: str = ""


RECIPES = (
    Recipe("old", OLD, "the last hidden state, KL"),
    Recipe("layers", TAPS, "old + context of four layers"),
    Recipe("prefix", PREFIX, "layers + prefix attention over 256 tokens"),
    Recipe("norm", NORM, "prefix + output norm"),
    Recipe("prompts", PROMPTS, "norm + prompts learned, loss over 4,096 tokens"),
    Recipe("lk", (*NORM, "--loss", "lk"), "norm with the acceptance loss in place of KL"),
    Recipe("tied", (*PROMPTS, "--output-layer", "tied"), "prompts with the target's own output layer"),
    Recipe("no-rnn", (*NORM, "--no-rnn"), "norm without recurrence"),
    Recipe("medusa", ("--method", "medusa"), "Medusa heads"),
    Recipe("rich", RICH, "what `train` takes by default"),
    Recipe("eagle", ("--method", "eagle", *RICH), "EAGLE-3 head, learned as rich"),
)


def words(text: str, what: str) -> list[str]:
    """Flags as a shell splits them. Raises UserError for a quote without its end, naming `what` it stands in."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error


def chosen(names: list[str] | None) -> list[Recipe]:
    """The recipes of these names, all of them if none are given; NAME=FLAGS is a recipe of one's own.

    Raises:
        UserError: a name that there is not, or one that comes twice.
    """
    known = {recipe.name: recipe for recipe in RECIPES}
    found: dict[str, Recipe] = {}
    for text in known if names is None else names:
        name, own, flags = text.partition("=")
        if not own and name not in known:
            raise UserError(f"--recipes {name}: expected some of {', '.join(known)}, or NAME=FLAGS")
        if not name.replace("-", "").isalnum() or name in found:
            raise UserError(f"--recipes {text}: expected names of letters, digits and -, each once")
        found[name] = Recipe(name, tuple(words(flags, f"--recipes {text}")), flags) if own else known[name]
    return list(found.values())


def with_layers(flags: tuple[str, ...], layers: int) -> list[str]:
    """The flags for a target of so many layers."""
    return [word for flag in flags for word in (map(str, quarters(layers)) if flag == LAYERS else [flag])]
