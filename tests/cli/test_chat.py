"""`mlx-redrafter chat`: what is typed, what is printed, and what is kept in a file."""

import builtins

import pytest

from mlx_redrafter.cli.chat import answer, read_message
from mlx_redrafter.cli.main import main
from mlx_redrafter.text.conversation import Conversation

TURNS = ["import os", "def main():"]


def test_interrupt_in_the_terminal(pair, capsys, monkeypatch):
    """If this fails, Ctrl-C ends the program, or the conversation is lost."""
    model, drafter, tokenizer = pair
    conversation = Conversation(model, tokenizer, drafter, max_tokens=24)
    printed, original = [], builtins.print

    def interrupting(*args, **kwargs):
        printed.append(args)
        if len(printed) == 3:
            raise KeyboardInterrupt
        original(*args, **kwargs)

    monkeypatch.setattr(builtins, "print", interrupting)
    answer(conversation, TURNS[0])
    monkeypatch.setattr(builtins, "print", original)
    assert "stopped]" in capsys.readouterr().out
    assert len(conversation.messages) == 2
    answer(conversation, TURNS[1])
    assert "mean acceptance length" in capsys.readouterr().out
    assert len(conversation.messages) == 4


def test_commands(monkeypatch, capsys):
    lines = iter(["h", "import os", "r", "", "def f(x):", "q"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", "-m", "8"]) == 0
    out = capsys.readouterr().out
    assert out.count("q: quit") == 2 and "(forgotten)" in out and out.count("tokens/s") == 2
    assert next(lines, None) is None


def test_end_of_input_ends_the_chat(monkeypatch, capsys):
    def nothing(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", nothing)
    assert main(["chat"]) == 0
    out = capsys.readouterr().out
    assert out.count("q: quit") == 1 and "tokens/s" not in out and out.endswith("\n\n")


def test_messages_of_several_lines(monkeypatch):
    lines = iter(['"""def f(x):', "    y = x", '"""', "one", '"""both"""'])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert [read_message(), read_message()] == ["def f(x):\n    y = x", "one"]
    assert read_message() == "both"


def test_a_conversation_in_a_file(monkeypatch, capsys, tmp_path):
    """If this fails, --prompt-cache-file does not keep the conversation between two runs."""
    file = str(tmp_path / "talk.safetensors")
    for turn, lines in enumerate((["import os", "q"], ["def f():", "q"])):
        script = iter(lines)
        monkeypatch.setattr("builtins.input", lambda prompt, script=script: next(script))
        assert main(["chat", "-m", "8", "--prompt-cache-file", file]) == 0
        assert ("going on from" in capsys.readouterr().out) == bool(turn)
    from mlx_lm.models.cache import load_prompt_cache

    _, metadata = load_prompt_cache(file, return_metadata=True)
    assert metadata["messages"].count('"role"') == 4
    assert main(["chat", "--model", str(tmp_path), "--prompt-cache-file", file]) == 2


@pytest.mark.parametrize("flags", [["--chat-template-config", "{"], ["--chat-template-config", "[1]"]])
def test_bad_template_options(flags, capsys):
    assert main(["chat", *flags]) == 2
    assert "--chat-template-config" in capsys.readouterr().err


def test_a_refused_first_message_leaves_a_file_that_can_be_read(monkeypatch, capsys, tmp_path):
    """If this fails, one message that is too long costs the conversation kept in a file."""
    file = str(tmp_path / "talk.safetensors")
    for lines in (["import os", "x = 1; " * 2000, "q"], ["def f():", "r", "q"], ["import sys", "q"]):
        script = iter(lines)
        monkeypatch.setattr("builtins.input", lambda prompt, script=script: next(script))
        flags = ["--system-prompt", "# code", "-m", "5", "--prompt-cache-file", file]
        assert main(["chat", *flags]) == 0
    assert "context of 2048" in capsys.readouterr().out
