"""The `openai` client gets from this server what it would get from others, whole and in pieces."""

from __future__ import annotations

import openai
import pytest

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}]


@pytest.fixture(scope="module")
def stories_client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def client(told):
    with openai.OpenAI(base_url=f"{told.url}/v1", api_key="any", max_retries=0) as client:
        yield client


TURNS = [
    {"role": "system", "content": "You tell stories. "},
    {"role": "user", "content": "Of a cat? "},
    {"role": "assistant", "content": "Once upon a time, there was a cat. "},
    {"role": "user", "content": [{"type": "text", "text": "And a dog?"}]},
]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.8, "seed": 3, "top_p": 0.9}])
def test_a_conversation(stories_client, sampling):
    """If this fails, a program that speaks to OpenAI cannot speak to this server, or its pieces are another text."""
    asked = {"model": "tiny", "messages": TURNS, "max_tokens": 20, **sampling}
    whole = stories_client.chat.completions.create(**asked)
    [choice] = whole.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    pieces = list(stories_client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == choice.message.content
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == "length"
    usage = pieces[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 20)
    assert usage.prompt_tokens_details.cached_tokens > 0
    assert usage.draft_tokens == whole.usage.draft_tokens > 0 and pieces[-2].timings["shape"] == "chain of 3"


@pytest.mark.parametrize("top", [None, 2])
def test_logprobs(stories_client, top):
    """If this fails, a program that reads probabilities reads those of other tokens, or none in a stream."""
    asked = {"model": "tiny", "messages": TURNS, "max_tokens": 8, "temperature": 1, "seed": 5, "logprobs": True}
    asked |= {} if top is None else {"top_logprobs": top}
    choice = stories_client.chat.completions.create(**asked).choices[0]
    told = choice.logprobs.content
    assert "".join(one.token for one in told).strip() == choice.message.content.strip()
    for one in told:
        assert one.logprob < 0 and bytes(one.bytes).decode() == one.token and len(one.top_logprobs) == (top or 0)
        assert one.top_logprobs == sorted(one.top_logprobs, key=lambda other: -other.logprob)
    pieces = [piece.choices[0].logprobs for piece in stories_client.chat.completions.create(**asked, stream=True)]
    assert [one.token for piece in pieces if piece for one in piece.content] == [one.token for one in told]


def test_stop(client):
    asked = {"model": "parrot", "messages": [{"role": "user", "content": "<greet>"}]}
    choice = client.chat.completions.create(**asked, stop=["world"]).choices[0]
    assert choice.message.content == "Hello " and choice.finish_reason == "stop" and choice.stop_reason == "world"


@pytest.mark.parametrize("stream", [False, True])
def test_tools(client, stream):
    """If this fails, an agent sees a call of a tool as text, or not at all."""
    asked = {"model": "parrot", "messages": [{"role": "user", "content": "<call>"}], "tools": TOOLS}
    if stream:
        choices = [piece.choices[0] for piece in client.chat.completions.create(**asked, stream=True)]
        text = "".join(choice.delta.content or "" for choice in choices)
        [call] = [call for choice in choices for call in choice.delta.tool_calls or []]
        reason = choices[-1].finish_reason
    else:
        [choice] = client.chat.completions.create(**asked).choices
        text, [call], reason = choice.message.content, choice.message.tool_calls, choice.finish_reason
    assert (text, reason) == ("Let me see.", "tool_calls")
    assert (call.function.name, call.function.arguments) == ("add", '{"a": 1}')
    turns = [
        *asked["messages"],
        {
            "role": "assistant",
            "content": text,
            "tool_calls": [{"id": call.id, "type": "function", "function": dict(call.function)}],
        },
        {"role": "tool", "tool_call_id": call.id, "content": "<greet>"},
    ]
    assert client.chat.completions.create(**asked | {"messages": turns}).choices[0].message.content.startswith("Hello")


def test_text(client):
    assert client.completions.create(model="parrot", prompt="<greet>").choices[0].text == "Hello world, good bye now"
    pieces = client.completions.create(model="parrot", prompt=["<greet>"], stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "Hello world, good bye now"


def test_errors(client):
    """If this fails, a program takes its own mistake for an error of the server, and tries again."""
    asked = {"model": "parrot", "messages": [{"role": "user", "content": "<greet>"}]}
    with pytest.raises(openai.BadRequestError, match="n: 2 is greater than the maximum of 1"):
        client.chat.completions.create(**asked, n=2)
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(**asked, response_format={"type": "yaml"})
    with pytest.raises(openai.NotFoundError, match="no such directory"):
        client.chat.completions.create(**asked | {"model": "gpt-4o"})


def test_models(client):
    first = next(iter(client.models.list()))
    assert first.id == "parrot" and client.models.retrieve("parrot") == first


# What Open WebUI (backend/open_webui/utils/payload.py) and Continue (core/llm/llms/OpenAI.ts) send with a chat.
OPEN_WEBUI = {
    "stream": True, "stream_options": {"include_usage": True}, "max_tokens": None, "temperature": 0.8, "top_k": 40,
    "top_p": 0.9, "frequency_penalty": 0.1, "seed": 7, "stop": ["\n\n\n"],
    "user": {"name": "x", "id": "1", "email": "x@y"}, "chat_id": "c",
    "logit_bias": {"5": -10}, "metadata": {"chat_id": "1"}, "session_id": "s", "id": "i",
    "background_tasks": {"title_generation": True}, "features": {"web_search": False}, "tool_ids": [], "files": [],
    "variables": {"{{USER_NAME}}": "x"},
}  # fmt: skip
CONTINUE = {
    "stream": True, "max_tokens": 50, "temperature": 0.5, "stop": ["<|endoftext|>", "\n\n\n"], "presence_penalty": 0,
    "top_p": 0.9, "frequency_penalty": 0,
    "parallel_tool_calls": False, "prediction": {"type": "content", "content": "x"}, "tool_choice": "auto",
    "tools": TOOLS,
}  # fmt: skip


@pytest.mark.parametrize("extra", [OPEN_WEBUI, CONTINUE], ids=["Open WebUI", "Continue"])
def test_what_real_interfaces_send(told, extra):
    """If this fails, the interfaces that most people have in front of a server are refused by this one."""
    fields = {"model": "parrot", "messages": [{"role": "user", "content": "<greet>"}], **extra}
    pieces = told.pieces("/v1/chat/completions", **fields)
    assert "".join(p["choices"][0]["delta"].get("content", "") for p in pieces if p["choices"]).startswith("Hello")


def test_a_title_for_a_chat(told):
    """If this fails, the small tasks that an interface asks for beside the chat are refused."""
    asked = {"model": "parrot", "messages": [{"role": "user", "content": "<greet>"}], "stream": False}
    answer = told.post("/v1/chat/completions", **asked, max_completion_tokens=2, metadata={"task": "title_generation"})
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 2
