"""Structured answers over HTTP: what was asked for, or one clear refusal, and the server goes on."""

import functools
import json

import jsonschema
import pytest
from support.schemas import SCHEMAS

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
LARGE = {"type": "object", "properties": {f"field{i:05}": {"type": "string"} for i in range(30_000)}}

DEEP = functools.reduce(lambda inner, _: {"items": inner}, range(200), {})
EXPLODING = f"^{'a?' * 500}{'a' * 500}$"


def form(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


def test_answers_fulfil_their_schema(served):
    """If this fails, a client gets other JSON than it asked for, or another text with drafts than without."""
    for title in ("sensor", "light"):
        asked = {"prompt": "Once upon a time", "max_tokens": 200, "response_format": form(SCHEMAS[title])}
        drafted, plain = served.post(TEXT, **asked), served.post(TEXT, **asked, num_draft_tokens=0)
        assert drafted["choices"] == plain["choices"] and drafted["choices"][0]["finish_reason"] == "stop"
        jsonschema.validate(json.loads(drafted["choices"][0]["text"]), SCHEMAS[title])
        usage, timings = drafted["usage"], drafted["timings"]
        assert plain["timings"]["method"] == "plain" and plain["usage"]["forced_tokens"] == 0
        assert (
            0 <= usage["accepted_tokens"] <= usage["draft_tokens"] and usage["forced_tokens"] == timings["forced_n"] > 0
        )
    [message] = [
        choice["message"]["content"]
        for choice in served.post(
            CHAT, messages=[{"role": "user", "content": "hi"}], response_format={"type": "json_object"}, max_tokens=8
        )["choices"]
    ]
    assert message.startswith("{")
    pieces = served.pieces(TEXT, prompt="Once", response_format=form(SCHEMAS["light"]), max_tokens=200)
    jsonschema.validate(json.loads("".join(piece["choices"][0]["text"] for piece in pieces)), SCHEMAS["light"])


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "array", "uniqueItems": True}, "response_format.json_schema.schema: Unimplemented keys"),
        (ENDLESS, "response_format.json_schema.schema: # requires itself without end"),
        (LARGE, "response_format.json_schema.schema has 1020034 bytes"),
        ({"type": "strin"}, "response_format.json_schema.schema: Invalid type"),
        (False, "response_format.json_schema.schema is false"),
        ("x", "response_format.json_schema.schema: 'x' is not of type"),
        (DEEP, "response_format.json_schema.schema: recursion limit exceeded"),
        ({"type": "string", "pattern": EXPLODING}, "structured output: lexer error: too many expressions"),
        ({"type": "integer", "maximum": -(2**63)}, "response_format.json_schema.schema: maximum cannot be kept"),
    ],
    ids=["unsupported", "endless", "large", "wrong", "never", "none", "deep", "exploding", "far"],
)
def test_what_cannot_be_kept_is_refused(served, schema, words):
    """If this fails, a wrong schema ends the server, or its answer is something else."""
    status, message = served.refusal(TEXT, {"prompt": "Once", "response_format": form(schema)})
    assert status == 400 and message.startswith(words)
    assert served.refusal(TEXT, {"prompt": "Once", "response_format": {"type": "json_schema"}})[0] == 400
    assert served.post(TEXT, prompt="Once", max_tokens=1)["usage"]["completion_tokens"] == 1


FIVE = {"type": "object", "properties": {"a": {"enum": [5]}}, "required": ["a"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": FIVE, "strict": strict}}
    for name, strict in (("add", True), ("take", False))
]


def asked_to_call(cue, choice="auto", tools=TOOLS, **more):
    return {
        "messages": [{"role": "user", "content": cue}],
        "tools": tools,
        "tool_choice": choice,
        "max_tokens": 64,
    } | more


def called(answer):
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in answer["message"].get("tool_calls", ())
    ]


def test_calls_are_what_a_strict_tool_takes(told):
    """If this fails, a tool gets arguments that it cannot take, or a model that may call it cannot say anything else.

    The model of this server says `{"a": 1}` where nothing holds it.
    """
    loose = [{"type": "function", "function": tool["function"] | {"strict": False}} for tool in TOOLS]
    ways = {}
    for tools, expected in ((TOOLS, 5), (loose, 1)):
        [answer] = told.post(CHAT, **asked_to_call("<call>", tools=tools))["choices"]
        [plain] = told.post(CHAT, **asked_to_call("<call>", tools=tools, num_draft_tokens=0))["choices"]
        assert called(answer) == called(plain) == [("add", {"a": expected})]
        assert answer["message"]["content"] == plain["message"]["content"] == "Let me see."
        ways[expected] = answer["finish_reason"]
    assert ways == {5: "tool_calls", 1: "tool_calls"}
    assert (
        told.post(CHAT, **asked_to_call("<greet>"))["choices"][0]["message"]["content"] == "Hello world, good bye now"
    )


def test_a_call_can_be_required(told):
    """If this fails, a program that needs a call gets an answer without one, or another tool's."""
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        [answer] = told.post(CHAT, **asked_to_call("<greet>", choice))["choices"]
        assert called(answer)[0] == ("add", {"a": 5}) and not answer["message"].get("content")
    strict = [{"type": "function", "function": tool["function"] | {"strict": True}} for tool in TOOLS]
    asked = asked_to_call("<greet>", {"type": "function", "function": {"name": "take"}}, strict)
    assert called(told.post(CHAT, **asked)["choices"][0]) == [("take", {"a": 5})]
    input_schema = {"name": "add", "input_schema": FIVE, "strict": True}
    message = {"messages": [{"role": "user", "content": "<greet>"}], "tools": [input_schema], "max_tokens": 64}
    for choice in ({"type": "any"}, {"type": "tool", "name": "add"}):
        assert told.post("/v1/messages", **message, tool_choice=choice)["content"][0]["input"] == {"a": 5}
    function = {"type": "function", "name": "add", "parameters": FIVE, "strict": True}
    for choice in ("required", {"type": "function", "name": "add"}):
        asked = {"input": "<greet>", "tools": [function], "tool_choice": choice, "max_output_tokens": 64}
        assert told.post("/v1/responses", **asked)["output"][0]["arguments"] == '{"a": 5}'


@pytest.mark.parametrize("drafts", [{}, {"num_draft_tokens": 0}, {"num_draft_tokens": 3}])
def test_thoughts_have_a_budget(told, drafts):
    """If this fails, a model thinks for as long as it likes, or says nothing after its thoughts."""
    asked = {"messages": [{"role": "user", "content": "<ponder>"}], "max_tokens": 64} | drafts
    for budget in (0, 5, None):
        for _ in range(2):  # the second time the prompt is cached
            [answer] = told.post(CHAT, **asked, thinking_budget=budget)["choices"]
            thought = answer["message"].get("reasoning") or ""
            assert thought == "".join(f"hm{n} " for n in range(30 if budget is None else budget))
            assert answer["message"]["content"] == "So."
    thinking = {"type": "enabled", "budget_tokens": 5}
    message = told.post("/v1/messages", **asked, thinking=thinking)["content"]
    assert [message[0]["thinking"], message[1]["text"]] == ["hm0 hm1 hm2 hm3 hm4 ", "So."]
    form = {"type": "json_object"}
    assert told.post(CHAT, **asked, thinking_budget=0, response_format=form)["choices"][0]["message"]["content"]


def test_calls_that_cannot_be_had_are_refused(served, told):
    """If this fails, a client waits for a call that cannot be made, or gets one that breaks its schema."""
    wrong = [{"type": "function", "function": {"name": "add", "parameters": {"not": {}}, "strict": True}}]
    other = {"type": "function", "function": {"name": "other"}}
    for asked, words in (
        (asked_to_call("<call>", tools=wrong), "tools: add: "),
        (asked_to_call("<call>", other), "tool_choice: the tool is not among tools"),
        (asked_to_call("<call>", response_format={"type": "json_object"}), "response_format: found with tools"),
    ):
        status, message = told.refusal(CHAT, asked)
        assert status == 400 and message.startswith(words), message
    status, message = served.refusal(CHAT, asked_to_call("hi"))
    assert status == 400 and message.startswith("tools: the tool parser is none, expected one of json_tools, ")
    assert served.post(CHAT, **asked_to_call("hi", "none", max_tokens=1))["usage"]["completion_tokens"] == 1
