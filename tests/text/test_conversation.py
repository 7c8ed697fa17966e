"""A conversation keeps its cache across turns and writes what recomputing everything would."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import RotatingKVCache

from mlx_redrafter import UserError, generate
from mlx_redrafter.cli.chat import answer
from mlx_redrafter.decoding import loop
from mlx_redrafter.text.conversation import Conversation

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


def test_twenty_turns_with_edits_interrupts_and_a_resumed_file(pair, tmp_path):
    """If this fails, what a long conversation remembers drifts from what was said."""
    model, drafter, tokenizer = pair
    file = tmp_path / "talk.safetensors"
    talk = Conversation(model, tokenizer, drafter, system_prompt="# code", max_tokens=12)
    for turn in range(20):
        if turn in (6, 13):  # edited: an answer is replaced, or turns are taken back
            talk.messages[-1] = {"role": "assistant", "content": "    pass"} if turn == 6 else talk.messages[-1]
            del talk.messages[9 if turn == 13 else len(talk.messages) :]
        if turn == 10:
            talk.save(file, "x")
            resumed = Conversation(model, tokenizer, drafter, system_prompt="# code", max_tokens=12)
            resumed.load(file, "x")
            assert resumed.messages == talk.messages
            talk = resumed
        stream = talk.ask(f"def f{turn}(x):")
        taken = [next(stream).text for _ in range(1 + turn % 4)] if turn % 5 == 3 else [r.text for r in stream]
        stream.close()
        said = "".join(taken)
        assert talk.messages[-1]["content"] == said
        whole = recomputed(pair, talk, max_tokens=12)
        assert whole.startswith(said) and (whole == said or turn % 5 == 3)


def test_memory_returns_to_that_of_one_conversation(pair):
    """If this fails, every conversation leaves its cache behind."""
    model, drafter, tokenizer = pair
    talk = Conversation(model, tokenizer, drafter, max_tokens=8)
    levels = []
    for _ in range(4):
        list(talk.ask("x = 1\n" * 100))
        list(talk.ask("y = 2"))
        talk.reset()
        mx.synchronize()
        levels.append(mx.get_active_memory())
    assert levels[-1] <= levels[0] + 2**20


def test_a_template_that_fails_in_mid_conversation(pair, capsys):
    """If this fails, one bad turn costs the history."""
    model, drafter, tokenizer = pair
    talk = Conversation(model, tokenizer, drafter, max_tokens=8)
    list(talk.ask(TURNS[0]))
    before = list(talk.messages)
    talk.template_options = {"chat_template": "{{ raise_exception('no') }}"}
    answer(talk, "hello")
    assert "(the tokenizer's chat template: no)" in capsys.readouterr().out and talk.messages == before
    talk.template_options = {}
    assert "".join(r.text for r in talk.ask(TURNS[1])) == recomputed(pair, talk, max_tokens=8)


@pytest.mark.parametrize("drafting", [True, False])
def test_interrupted_anywhere_the_cache_fits(pair, monkeypatch, drafting, tmp_path):
    """If this fails, Ctrl-C in the middle of a step leaves a row too many, and a file that cannot be read."""
    model, drafter, tokenizer = pair
    talk = Conversation(model, tokenizer, drafter if drafting else None, max_tokens=16)
    list(talk.ask(TURNS[0]))
    waits, real = [], loop.wait_for

    def interrupted(tokens):
        waits.append(1)
        if len(waits) == 4:
            raise KeyboardInterrupt
        return real(tokens)

    monkeypatch.setattr(loop, "wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(talk.ask(TURNS[1]))
    monkeypatch.setattr(loop, "wait_for", real)
    talk.save(tmp_path / "talk.safetensors", "x")
    again = Conversation(model, tokenizer, drafter, max_tokens=16)
    again.load(tmp_path / "talk.safetensors", "x")
    assert len(again._read) == again._cache[0].offset > 0
    said = "".join(r.text for r in again.ask(TURNS[2]))
    assert said == recomputed(pair, again, max_tokens=16)
