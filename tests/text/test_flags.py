"""Flags of generating commands stand for what their help says."""

import argparse
import json

import pytest
from support.commands import code_of

from mlx_redrafter import DraftShape, UserError
from mlx_redrafter.constraints.constraint import lark, regex
from mlx_redrafter.text.flags import (
    add_generation_arguments,
    add_model_arguments,
    constraint_of,
    draft_shape,
    template_options,
)


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


def test_what_a_text_has_to_be(tmp_path, capsys):
    """If this fails, a flag of structured output is lost, or its mistake costs the loading of a model."""
    parser = argparse.ArgumentParser()
    add_generation_arguments(parser, 10)
    (tmp_path / "schema.json").write_text('{"type": "array", "uniqueItems": true}')
    (tmp_path / "grammar.lark").write_text('start: "a" | "b"')
    assert constraint_of(parser.parse_args([])) is None
    assert constraint_of(parser.parse_args(["--regex", "a+"])) == regex("a+")
    assert constraint_of(parser.parse_args(["--grammar", str(tmp_path / "grammar.lark")])) == lark('start: "a" | "b"')
    for command in ("generate", "chat"):
        prompt = ["--prompt", "x"] if command == "generate" else []
        assert code_of(command, *prompt, "--model", "/none", "--json-schema", str(tmp_path / "schema.json")) == 2
        said = capsys.readouterr().err
        assert "--json-schema" in said and 'Unimplemented keys: ["uniqueItems"]' in said and said.count("\n") == 1
    assert code_of("generate", "--prompt", "x", "--model", "/none", "--regex", "[") == 2
    assert code_of("generate", "--prompt", "x", "--model", "/none", "--grammar", str(tmp_path / "none")) == 2
    assert code_of("generate", "--prompt", "x", "--regex", "a", "--grammar", "b") == 2


def test_a_structured_answer(capsys):
    """If this fails, a command's text is not what its flag asks for."""
    assert code_of("generate", "--prompt", "import os\n", "--regex", "(yes|no){2}", "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"] in {a + b for a in ("yes", "no") for b in ("yes", "no")}


def test_a_thinking_budget(parrot, capsys):
    """If this fails, a flag does not end thoughts, or is taken where it could not."""
    asked = ("generate", "--model", str(parrot), "--prompt", "<ponder>")
    assert code_of(*asked, "--thinking-budget", "2") == 0
    assert capsys.readouterr().out.startswith("<think>hm0 hm1 </think>So.\n")
    assert code_of(*asked, "--thinking-budget", "2", "--regex", "a") == 2
    assert "not allowed with argument" in capsys.readouterr().err
    assert code_of("generate", "--model", "embedded", "--prompt", "x", "--thinking-budget", "2") == 2
    assert "--thinking-budget: the model's tokenizer has no tokens that" in capsys.readouterr().err
