"""Prompts come as text, as ids in any array, and as messages of several forms; the rest is refused in one line.

Looked for: text, lists, tuples, mlx and numpy arrays of shape (n,) and (1, n), content as text, as parts, as null and
missing, parts that are no text, messages with tool calls.
"""

import mlx.core as mx
import numpy as np
import pytest
from support import make_drafter, make_model

from mlx_redrafter import Conversation, UserError, stream_generate
from mlx_redrafter.text.prompts import encode, encode_messages, plain_messages

IDS = [3, 14, 15]


@pytest.mark.parametrize(
    "prompt",
    [
        IDS, tuple(IDS), [IDS], mx.array(IDS), mx.array([IDS]), np.array(IDS), np.array([IDS]),
        np.array(IDS, np.uint16), mx.array(IDS, mx.uint32), [np.int64(i) for i in IDS],
    ],
    ids=range(10),
)  # fmt: skip
def test_ids_in_any_array(pair, prompt):
    """If this fails, what a tokenizer returned cannot be handed on."""
    assert encode(pair[2], prompt) == IDS


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        (np.zeros((1, 0), np.int32), "the prompt is empty"),
        (np.array([IDS, IDS]), r"has shape \(2, 3\), expected \(n,\) or \(1, n\)"),
        (mx.array([1.0]), "has elements of type float32, expected whole numbers"),
        ([True, False], "has elements of type bool"),
        ([[1], [1, 2]], "is no array of token ids"),
        (["a", "b"], "expected whole numbers"),
        ("\udcff", "not valid UTF-8"),
    ],
    ids=range(9),
)
def test_what_is_no_prompt(pair, prompt, words):
    with pytest.raises(UserError, match=words):
        encode(pair[2], prompt)


@pytest.mark.parametrize("token", [-1, 97, 10**6])
def test_ids_that_the_model_does_not_have(pair, token):
    """If this fails, the model reads memory that is not its embedding's."""
    with pytest.raises(UserError, match=f"has the token id {token}, expected 0 to 96"):
        next(stream_generate(make_model(), pair[2], [1, token]))


PARTS = [{"type": "text", "text": "import "}, {"type": "text", "text": "os"}]


def test_messages_of_text_parts(pair):
    """If this fails, a history that was written for OpenAI's interface ends in an AttributeError."""
    plain = [{"role": "user", "content": "import os"}]
    given = [{"role": "user", "content": PARTS}]
    assert plain_messages(given) == plain and given[0]["content"] == PARTS
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert plain_messages([calls]) == [calls | {"content": ""}]
    template = {"chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"}
    assert encode_messages(pair[2], given, template) == encode_messages(pair[2], plain, template)


@pytest.mark.parametrize(
    "message, words",
    [
        ({"role": "user", "content": None}, "message 1 (user) has the content None, expected text or a list"),
        ({"role": "user"}, "message 1 (user) has the content None"),
        ({"role": "user", "content": 5}, "message 1 (user) has the content 5"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "has a part {'type': 'image_url'"),
        ({"role": "user", "content": ["hi"]}, "has a part 'hi'"),
        ({"content": "hi"}, "message 1 is {'content': 'hi'}, expected an object with role and content"),
        ("hi", "message 1 is 'hi'"),
        ({"role": "user", "content": "\udcff"}, "message 1 is not valid UTF-8"),
    ],
)
def test_messages_without_text(message, words):
    """If this fails, a wrong message is a KeyError that says nothing of where it is."""
    with pytest.raises(UserError) as refused:
        plain_messages([message])
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("template", [True, False])
def test_a_history_in_a_conversation(pair, template, monkeypatch):
    """If this fails, the messages of a conversation cannot be put in place in OpenAI's form."""
    talk = Conversation(make_model(vocab=4096), make_drafter(vocab=4096), pair[2])
    talk.drafter, talk.tokenizer, talk.options = None, pair[2], {"max_tokens": 4}
    if not template:
        monkeypatch.setattr(type(pair[2]), "chat_template", None, raising=False)
    talk.messages = [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "x"}]
    said = "".join(r.text for r in talk.ask("y"))
    assert talk.messages[-1] == {"role": "assistant", "content": said}
    talk.messages[0] = {"role": "user", "content": None}
    before = list(talk.messages)
    with pytest.raises(UserError, match="message 1"):
        next(talk.ask("z"))
    assert talk.messages == before
