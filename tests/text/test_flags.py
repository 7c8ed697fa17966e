"""Flags of generating commands stand for what their help says."""

import argparse

import pytest

from mlx_redrafter import DraftShape, UserError
from mlx_redrafter.text.flags import add_generation_arguments, add_model_arguments, draft_shape, template_options


@pytest.mark.parametrize(
    "flags, shape",
    [
        ([], "auto"),
        (["--beam-width", "auto", "--num-draft-tokens", "auto"], "auto"),
        (["--beam-width", "1"], DraftShape()),
        (["--beam-width", "4"], DraftShape(4, 5, 7)),
        (["--beam-length", "3"], DraftShape(1, 3, 2)),
        (["--num-draft-tokens", "2"], DraftShape(1, 4, 2)),
        (["--beam-width", "2", "--beam-length", "3", "--num-draft-tokens", "auto"], DraftShape(2, 3, 4)),
        (["--tree-policy", "best-first"], "auto"),
        (["--tree-policy", "beams"], DraftShape(4, 5, 7, "beams")),
        (["--tree-policy", "beams", "--num-draft-tokens", "12"], DraftShape(4, 5, 12, "beams")),
        (["--tree-policy", "beams", "--beam-width", "2"], DraftShape(2, 5, 7, "beams")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_shapes(flags, shape):
    """If this fails, a flag means another shape than its help says; a policy alone has to mean a tree."""
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    assert draft_shape(parser.parse_args(flags)) == shape


@pytest.mark.parametrize("given, words", [("{", "not JSON"), ("[1]", "found a JSON list, expected an object")])
def test_options_of_the_template(given, words):
    parser = argparse.ArgumentParser()
    add_generation_arguments(parser, 10)
    assert template_options(parser.parse_args([])) == {}
    assert template_options(parser.parse_args(["--chat-template-config", '{"thinking": false}'])) == {"thinking": False}
    with pytest.raises(UserError, match=f"--chat-template-config: {words}"):
        template_options(parser.parse_args(["--chat-template-config", given]))
