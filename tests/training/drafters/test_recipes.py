"""Recipes fill in what is not given, and nothing else."""

import argparse
import json

import pytest
from support.commands import code_of

from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.target.model import Target
from mlx_redrafter.training.drafters.recipes import RECIPES, USUAL, follow
from mlx_redrafter.training.flags import add_arguments, check, check_for, training_plan
from mlx_redrafter.training.report import command_line
from mlx_redrafter.training.resume import arguments_of, defaults, resumed


def parse(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--out", "x", *words])


def filled(target, *words):
    args = parse(*words)
    follow(args)
    check(args)
    follow(args, target)
    check_for(args, target)
    return args


@pytest.fixture
def target(stories_pair):
    return Target.of(stories_pair[0])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("more", [(), ("--beam-length", "7"), ("--method", "medusa")])
def test_recipes_are_flags_that_fit(recipe, more, target):
    """If this fails, a recipe sets what the command would refuse."""
    if recipe == "apple" and "medusa" in more:
        return  # Apple has no such heads; the flags are taken as they are
    args = filled(target, "--recipe", recipe, *more)
    plan = training_plan(args, on_cpu=True)
    assert len(plan.objective.step_shares) == args.beam_length - 1
    if recipe == "rich" and not more:
        assert (args.context_layers, args.prefix_window, args.output_norm) == ([1, 2, 3], 256, True)
        assert (args.loss_vocab, args.learn_prompts, args.batch_size, args.learning_rate) == (4096, True, 4, 1.5e-3)
        assert args.step_shares == [0.74, 0.4, 0.25, 0.15]
    if "medusa" in more:
        assert args.context_layers is None and not args.output_norm and not args.loss_vocab


def test_flags_come_before_the_recipe(target):
    """If this fails, a flag that was given is overruled."""
    args = filled(target, "--recipe", "rich", "--batch-size", "6", "--context-layers", "2", "--loss-vocab", "0")
    assert (args.batch_size, args.context_layers, args.loss_vocab, args.prefix_window) == (6, [2], 0, 256)
    assert vars(filled(target)).keys() == vars(parse()).keys() and parse().recipe == USUAL
    args = filled(target, "--recipe", "rich", "--init", "drafter")
    assert args.context_layers is None and args.prefix_window is None and args.batch_size == 4


def test_the_command_on_the_card_trains_the_same(target):
    """If this fails, a drafter cannot be made again by the command on its card."""
    for words in (
        ("--recipe", "rich", "--loss-vocab", "0"),
        ("--recipe", "apple", "--loss", "kl"),
        ("--recipe", "plain"),
    ):
        args = filled(target, *words)
        known = defaults() | RECIPES[args.recipe]
        again = filled(target, *command_line(arguments_of(args), known).split()[2:-2])
        assert arguments_of(again) == arguments_of(args)


def test_a_run_that_goes_on(tmp_path, target):
    """If this fails, a run that was begun with one recipe goes on with another."""
    notes = tmp_path / "training"
    notes.mkdir()
    begun = filled(target, "--recipe", "rich", "--batch-size", "6")
    (notes / "arguments.json").write_text(json.dumps(arguments_of(begun)))
    args = resumed(parse("--out", str(tmp_path), "--resume", "--iters", "9"))
    assert (args.recipe, args.batch_size, args.prefix_window, args.loss_vocab) == ("rich", 6, 256, 4096)
    args = resumed(parse("--out", str(tmp_path), "--resume", "--recipe", "apple"))  # nothing is learned yet
    assert (args.prefix_window, args.output_norm, args.loss, args.output_layer) == (None, False, "text", "random")
    old = {name: value for name, value in arguments_of(begun).items() if name != "recipe"}
    (notes / "arguments.json").write_text(json.dumps(old))  # of a run from before there were recipes
    assert resumed(parse("--out", str(tmp_path), "--resume")).recipe == "plain"


def test_apples_layout_is_a_word_away(stories, tmp_path):
    """If this fails, drafters that Apple's code reads cannot be trained any more."""
    small = ["--rows", "20", "--held-out", "2", "--row-length", "24", "--prefix-length", "8", "--iters", "2"]
    where = ["--model", str(stories), "--out", str(tmp_path / "a"), "--eval-every", "0"]
    assert code_of("train", *where, *small, "--recipe", "apple") == 0
    config = open_drafter(tmp_path / "a").config
    assert config.exit_dim == 2 * config.hidden_size and not config.tie_output and not config.has_input_proj
    assert code_of("convert", "export", "--mlx-path", str(tmp_path / "a"), "--hf-path", str(tmp_path / "b")) == 0
    assert json.loads((tmp_path / "a" / "training" / "result.json").read_text())["loss"] == "text"
    assert "--recipe apple" in (tmp_path / "a" / "README.md").read_text()
