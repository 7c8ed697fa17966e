"""Recipes by name."""

import pytest
from mlx_redrafter.benchmarks.ablation.recipes import RECIPES, chosen, with_layers

from mlx_redrafter import UserError


def test_names():
    """If this fails, a recipe that was asked for is not the one that is trained."""
    assert chosen(None) == list(RECIPES)
    old, own = chosen(["old", "mine=--loss lk --step-weights 1 1 1 1"])
    assert old.name == "old" and own.flags == ("--loss", "lk", "--step-weights", "1", "1", "1", "1")
    for names in (["no brain"], ["old", "old"], ["../x=--loss lk"], ["x='"]):
        with pytest.raises(UserError, match="--recipes"):
            chosen(names)


def test_layers_are_quarters_of_the_target():
    layers = next(recipe for recipe in RECIPES if recipe.name == "layers")
    assert with_layers(layers.flags, 30)[-5:] == ["--context-layers", "8", "15", "22", "30"]
    assert with_layers(layers.flags, 2)[-3:] == ["--context-layers", "1", "2"]
