"""Structured answers over HTTP: what was asked for, or one clear refusal, and the server goes on."""

import json

import jsonschema
import pytest
from support.schemas import SCHEMAS

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
ENDLESS = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
LARGE = {"type": "object", "properties": {f"field{i:05}": {"type": "string"} for i in range(30_000)}}


def form(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


def test_answers_fulfil_their_schema(served):
    """If this fails, a client gets other JSON than it asked for, or another text with drafts than without."""
    for title in ("sensor", "light"):
        asked = {"prompt": "Once upon a time", "max_tokens": 200, "response_format": form(SCHEMAS[title])}
        drafted, plain = served.post(TEXT, **asked), served.post(TEXT, **asked, num_draft_tokens=0)
        assert drafted["choices"] == plain["choices"] and drafted["choices"][0]["finish_reason"] == "stop"
        jsonschema.validate(json.loads(drafted["choices"][0]["text"]), SCHEMAS[title])
        assert plain["timings"]["method"] == "plain" and drafted["timings"]["draft_n_accepted"] > 0
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
    ],
    ids=["unsupported", "endless", "large", "wrong", "never", "none"],
)
def test_what_cannot_be_kept_is_refused(served, schema, words):
    """If this fails, a wrong schema ends the server, or its answer is something else."""
    status, message = served.refusal(TEXT, {"prompt": "Once", "response_format": form(schema)})
    assert status == 400 and message.startswith(words)
    assert served.refusal(TEXT, {"prompt": "Once", "response_format": {"type": "json_schema"}})[0] == 400
    assert served.post(TEXT, prompt="Once", max_tokens=1)["usage"]["completion_tokens"] == 1
