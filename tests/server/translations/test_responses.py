"""OpenAI's responses, by its own client."""

from __future__ import annotations

import openai
import pytest

TOOL = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}


@pytest.fixture(scope="module")
def client(told):
    with openai.OpenAI(base_url=f"{told.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.mark.parametrize(
    "given",
    [
        "<greet>",
        [
            {"role": "developer", "content": "x"},
            {"role": "user", "content": [{"type": "input_text", "text": "<greet>"}]},
        ],
        [
            {"role": "user", "content": "<call>"},
            {"type": "reasoning", "id": "r", "summary": []},
            {"type": "function_call", "call_id": "1", "name": "add", "arguments": '{"a": 1}'},
            {"type": "function_call", "call_id": "2", "name": "add", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "<greet>"},
        ],
    ],
    ids=["text", "messages", "calls"],
)
def test_text(client, given):
    """If this fails, a program that speaks the newer of OpenAI's APIs gets nothing, or another text in pieces."""
    answer = client.responses.create(model="parrot", input=given, instructions="Be brief.")
    assert (answer.status, answer.output_text) == ("completed", "Hello world, good bye now")
    assert answer.usage.output_tokens == 6 and answer.usage.draft_tokens >= 0 and answer.timings["draft_n"] >= 0
    with client.responses.stream(model="parrot", input=given, instructions="Be brief.") as stream:
        events = list(stream)
        last = stream.get_final_response()
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == answer.output_text
    assert last.output_text == answer.output_text and last.usage.output_tokens == 6
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_calls(client):
    answer = client.responses.create(model="parrot", input="<call>", tools=[TOOL])
    message, call = answer.output
    assert message.content[0].text == "Let me see." and (call.name, call.arguments) == ("add", '{"a": 1}')
    with client.responses.stream(model="parrot", input="<call>", tools=[TOOL]) as stream:
        message, call = stream.get_final_response().output
    assert message.content[0].text == "Let me see." and (call.name, call.arguments) == ("add", '{"a": 1}')


@pytest.mark.parametrize("stream", [False, True])
def test_json(client, stream):
    """If this fails, the newer API gives other JSON than was asked for, or any text."""
    schema = {"type": "object", "properties": {"a": {"enum": [3, 4]}}, "required": ["a"], "additionalProperties": False}
    forms = {"{": {"type": "json_object"}, '{"a": 3}': {"type": "json_schema", "name": "it", "schema": schema}}
    for begins, form in forms.items():
        asked = {"model": "parrot", "input": "<greet>", "max_output_tokens": 16, "text": {"format": form}}
        if stream:
            found = list(client.responses.create(**asked, stream=True))[-1].response
        else:
            found = client.responses.create(**asked)
        assert found.output_text.startswith(begins) and found.text.format.type == form["type"]


def test_an_answer_that_is_cut(client):
    answer = client.responses.create(model="parrot", input="<long>", max_output_tokens=16)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    events = list(client.responses.create(model="parrot", input="<long>", max_output_tokens=16, stream=True))
    assert events[-1].type == "response.incomplete" and events[-1].response.output_text == answer.output_text


@pytest.mark.parametrize(
    "more, words",
    [
        ({"previous_response_id": "x"}, "previous_response_id"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format.schema: "),
    ],
)
def test_what_cannot_be_had_is_refused(client, more, words):
    with pytest.raises(openai.BadRequestError, match=words):
        client.responses.create(model="parrot", input="<greet>", **more)
