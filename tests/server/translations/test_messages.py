"""Anthropic's messages, field by field as its documentation has them."""

from __future__ import annotations

import json

import pytest

from mlx_redrafter.server.translations.messages import Messages

PATH = "/v1/messages"
TOOL = {"name": "add", "description": "Adds.", "input_schema": {"type": "object", "properties": {"a": {}}}}


def ask(content="<greet>", **more):
    return {"model": "parrot", "max_tokens": 30, "messages": [{"role": "user", "content": content}]} | more


def events(client, **fields):
    status, headers, content = client.send("POST", PATH, fields | {"stream": True}, {"x-api-key": "any"})
    assert status == 200 and headers["Content-type"] == "text/event-stream"
    found = []
    for block in content.decode().strip().split("\n\n"):
        if not block.startswith(":"):
            name, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


@pytest.mark.parametrize(
    "more, text, reason, sequence",
    [
        ({}, "Hello world, good bye now", "end_turn", None),
        ({"max_tokens": 2}, "Hello wor", "max_tokens", None),
        ({"stop_sequences": ["x", "world"]}, "Hello ", "stop_sequence", "world"),
        (
            {"system": [{"type": "text", "text": "Be brief."}], "temperature": 0.5},
            "Hello world, good bye now",
            "end_turn",
            None,
        ),
    ],
)
def test_text(told, more, text, reason, sequence):
    """If this fails, a program that speaks to Anthropic cannot speak to this server."""
    answer = told.post(PATH, **ask([{"type": "text", "text": "<greet>"}], **more))
    assert answer["content"] == [{"type": "text", "text": text}] and answer["type"] == "message"
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    assert answer["usage"]["output_tokens"] >= 2 and answer["usage"]["draft_tokens"] >= 0 and answer["timings"]
    first, *middle, change, last = events(told, **ask(**more))
    assert first["message"]["content"] == [] and last["type"] == "message_stop"
    assert middle[0]["content_block"] == {"type": "text", "text": ""} and middle[-1]["type"] == "content_block_stop"
    assert "".join(event["delta"]["text"] for event in middle[1:-1]) == text
    assert change["delta"] == {"stop_reason": reason, "stop_sequence": sequence}
    assert change["usage"]["output_tokens"] == answer["usage"]["output_tokens"] and change["timings"]


def test_tools(told):
    """If this fails, an agent sees a call of a tool as text, or not at all."""
    answer = told.post(PATH, **ask("<call>", tools=[TOOL]))
    text, call = answer["content"]
    assert text == {"type": "text", "text": "Let me see."} and answer["stop_reason"] == "tool_use"
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "add", {"a": 1})
    found = events(told, **ask("<call>", tools=[TOOL]))
    begins = [event["content_block"]["type"] for event in found if event["type"] == "content_block_start"]
    assert begins == ["text", "tool_use"] and [e["index"] for e in found if e["type"] == "content_block_stop"] == [0, 1]
    assert [e["delta"]["partial_json"] for e in found if e.get("delta", {}).get("type") == "input_json_delta"] == [
        '{"a": 1}'
    ]
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "<greet>"}]}
    turns = [
        *ask("<call>")["messages"],
        {"role": "assistant", "content": [text, call]},
        {"role": "user", "content": [result]},
    ]
    assert told.post(PATH, **ask(tools=[TOOL], messages=turns))["content"][0]["text"].startswith("Hello")


def test_what_becomes_of_a_request():
    """If this fails, something of a conversation is lost on its way to the chat template."""
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}}
    use = {"type": "tool_use", "id": "1", "name": "add", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": "2"}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "look"}, image]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, use]},
        {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
    ]
    chat = Messages(
        {"max_tokens": 5, "messages": turns, "system": "s", "tools": [TOOL], "thinking": {"type": "enabled"}}
    ).chat()
    picture, called = {"url": "data:image/png;base64,AA"}, {"name": "add", "arguments": '{"a": 1}'}
    assert chat["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": picture}]},
        {"role": "assistant", "content": [], "tool_calls": [{"id": "1", "type": "function", "function": called}]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
        {"role": "user", "content": [{"type": "text", "text": "and?"}]},
    ]  # fmt: skip
    assert chat["tools"][0]["function"]["parameters"] == TOOL["input_schema"]
    assert chat["chat_template_kwargs"] == {"enable_thinking": True} and chat["stream_options"] == {
        "include_usage": True
    }


def test_refusals(told):
    assert told.refusal(PATH, {"messages": []})[0] == 400
    assert told.refusal(PATH, ask(tool_choice={"type": "all"})) == (
        400,
        "tool_choice.type: 'all' is not one of ['auto', 'none', 'any', 'tool']",
    )
    assert told.refusal(PATH, ask("<greet>" * 600))[0] == 400
    status, _, content = told.send("POST", PATH, ask("<greet>" * 600, stream=True))
    assert status == 400 and json.loads(content)["error"]["type"] == "invalid_request_error"
