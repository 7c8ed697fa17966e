"""Chat templates in every place where they live, and models tuned on chats that have none.

Looked for: tokenizer_config.json with one template and with a list of named ones, chat_template.jinja,
additional_chat_templates/, chat_template.json (text, list, object), processor_config.json, none at all.
"""

import json
import logging
import shutil

import pytest

from mlx_redrafter import UserError, load
from mlx_redrafter.cli.main import main
from mlx_redrafter.text.checks import has_chat_template
from mlx_redrafter.text.loading import EMBEDDED

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
NAMED = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "tools" + TEMPLATE}]


def in_config(folder, value):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": value}))


def additional(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools" + TEMPLATE)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


PLACES = {
    "tokenizer_config": lambda f: in_config(f, TEMPLATE),
    "a list in tokenizer_config": lambda f: in_config(f, NAMED),
    "jinja": lambda f: (f / "chat_template.jinja").write_text(TEMPLATE),
    "additional": additional,
    "chat_template.json": lambda f: (f / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE})),
    "a list in chat_template.json": lambda f: (f / "chat_template.json").write_text(
        json.dumps({"chat_template": NAMED})
    ),
    "named in chat_template.json": lambda f: (f / "chat_template.json").write_text(
        json.dumps({"chat_template": {each["name"]: each["template"] for each in NAMED}})
    ),
    "processor_config": lambda f: (f / "processor_config.json").write_text(json.dumps({"chat_template": TEMPLATE})),
}


@pytest.fixture
def bare(tmp_path):
    """The embedded target without a template."""
    folder = tmp_path / "target"
    shutil.copytree(EMBEDDED / "target", folder, ignore=shutil.ignore_patterns("*.jinja", "*.safetensors"))
    (folder / "model.safetensors").symlink_to(EMBEDDED / "target" / "model.safetensors")
    assert not has_chat_template(folder)
    return folder


@pytest.mark.parametrize("place", PLACES)
def test_a_chat_template_is_read_wherever_it_lies(place, bare, tmp_path, capsys):
    """If this fails, a chat model gets its prompt bare and says nothing, or loses its template when it is converted."""
    PLACES[place](bare)
    assert has_chat_template(bare)
    messages, expected = [{"role": "user", "content": "hi"}], "<user>hi"
    _, _, tokenizer = load(str(bare))
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    assert main(["convert", "target", "--hf-path", str(bare), "--mlx-path", str(tmp_path / "mlx")]) == 0
    _, _, converted = load(str(tmp_path / "mlx"))
    assert converted.apply_chat_template(messages, tokenize=False) == expected
    assert main(["inspect", str(bare), "--bandwidth", "9"]) == 0
    assert "no chat template" not in capsys.readouterr().out


def test_a_template_of_ones_own_comes_first(bare):
    PLACES["chat_template.json"](bare)
    _, _, tokenizer = load(str(bare), tokenizer_config={"chat_template": "mine"})
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "mine"


def test_a_template_that_is_none(bare):
    (bare / "chat_template.json").write_text('{"chat_template": 7}')
    with pytest.raises(UserError, match=r"chat_template.json: chat_template is neither a text nor"):
        load(str(bare))


def test_a_chat_model_without_a_template_says_so(bare, caplog):
    """If this fails, an assistant whose template is missing answers nonsense without a word."""
    with caplog.at_level(logging.WARNING):
        load(str(bare))
        assert not caplog.records
        named = bare.rename(bare.with_name("Some-7B-Instruct-4bit"))
        load(str(named))
        [record] = caplog.records
        assert "no chat template, though the model seems to be tuned on chats (its name" in record.getMessage()
        caplog.clear()
        PLACES["jinja"](named)
        load(str(named))
        assert not caplog.records


def test_a_chat_model_is_told_by_how_its_texts_end(bare, caplog):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (bare / name).read_text()
        (bare / name).write_text(text.replace("<|endoftext|>", "<|im_end|>"))
    with caplog.at_level(logging.WARNING):
        load(str(bare))
    assert "it ends its texts with <|im_end|>" in caplog.records[-1].getMessage()
