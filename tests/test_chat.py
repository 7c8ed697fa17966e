"""A conversation keeps its cache across turns and writes what recomputing everything would."""

import builtins

import pytest
from mlx_lm.models.cache import RotatingKVCache

from mlx_redrafter import UserError, generate
from mlx_redrafter.chat import answer
from mlx_redrafter.cli import main
from mlx_redrafter.conversation import Conversation

TURNS = ["import os", "def main():", "class A(object):\n    pass"]


def recomputed(pair, conversation, **options):
    model, _, tokenizer = pair
    messages = conversation.messages[:-1]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return generate(model, tokenizer, prompt, **options)


@pytest.mark.parametrize("drafting", [True, False])
def test_turns_equal_recomputing(pair, drafting):
    """If this fails, what was said earlier is remembered wrongly."""
    model, drafter, tokenizer = pair
    conversation = Conversation(model, tokenizer, drafter if drafting else None, max_tokens=24)
    for turn, text in enumerate(TURNS):
        said = "".join(r.text for r in conversation.ask(text))
        assert conversation.messages[-1] == {"role": "assistant", "content": said}
        assert len(conversation.messages) == 2 * (turn + 1)
        assert said == recomputed(pair, conversation, max_tokens=24)


def test_later_turns_read_only_what_is_new(pair):
    """If this fails, every turn pays for the whole conversation again."""
    model, drafter, tokenizer = pair
    conversation = Conversation(model, tokenizer, drafter, max_tokens=24)
    list(conversation.ask("x = 1\n" * 40))
    read = list(conversation.ask("y = 2"))[-1].prompt_tokens
    assert read < 20


@pytest.mark.parametrize("taken", [1, 2, 5])
def test_a_stopped_answer(pair, taken):
    """If this fails, Ctrl-C leaves a cache that does not fit the conversation."""
    model, drafter, tokenizer = pair
    conversation = Conversation(model, tokenizer, drafter, max_tokens=24)
    stream = conversation.ask(TURNS[0])
    said = "".join(next(stream).text for _ in range(taken))
    stream.close()
    assert conversation.messages[-1]["content"] == said
    again = "".join(r.text for r in conversation.ask(TURNS[1]))
    assert again == recomputed(pair, conversation, max_tokens=24)


def test_edited_history(pair):
    model, drafter, tokenizer = pair
    conversation = Conversation(model, tokenizer, drafter, system_prompt="# code", max_tokens=16)
    list(conversation.ask(TURNS[0]))
    list(conversation.ask(TURNS[1]))
    del conversation.messages[2:]
    said = "".join(r.text for r in conversation.ask(TURNS[2]))
    assert said == recomputed(pair, conversation, max_tokens=16)
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "# code"}]


def test_a_failed_turn_leaves_the_conversation_as_it_was(pair, monkeypatch):
    model, drafter, tokenizer = pair
    conversation = Conversation(model, tokenizer, drafter, max_tokens=8)
    list(conversation.ask(TURNS[0]))
    before = list(conversation.messages)
    with pytest.raises(UserError, match="context of 2048"):
        list(conversation.ask("x = 1\n" * 2000))
    with pytest.raises(UserError, match="empty"):
        list(conversation.ask("  "))
    assert conversation.messages == before
    said = "".join(r.text for r in conversation.ask(TURNS[1]))
    assert said == recomputed(pair, conversation, max_tokens=8)


def test_a_cache_that_cannot_be_rolled_back_is_made_anew(pair):
    model, _, tokenizer = pair
    conversation = Conversation(model, tokenizer, None, max_tokens=8)
    conversation._cache = [RotatingKVCache(max_size=16) for _ in model.layers]
    list(conversation.ask("x = 1\n" * 20))
    conversation.messages[0]["content"] = "y = 1"
    assert list(conversation.ask(TURNS[1]))


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


def test_end_of_input_ends_the_chat(monkeypatch):
    def nothing(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", nothing)
    assert main(["chat"]) == 0
