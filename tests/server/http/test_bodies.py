"""What the description says of a body is what the server makes of it."""

from __future__ import annotations

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from jsonschema import Draft202012Validator
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from support.serving import TINY, serving

from mlx_redrafter.server.answers import Answer
from mlx_redrafter.server.http import bodies

LONG = settings(
    max_examples=200, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
PATHS = {
    "/v1/completions": {"prompt": "<greet>", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "<greet>"}], "max_tokens": 1},
    "/v1/messages": {"messages": [{"role": "user", "content": "<greet>"}], "max_tokens": 1},
    "/v1/responses": {"input": "<greet>", "max_output_tokens": 1},
}
OTHERS = {"prompt": [], "messages": 5, "input": 5, "foo": 5}  # of other paths
VALUES = [None, True, -1, 1e300, 10**400, "\ud800", [], [{}], {"x": 0}]


def fields(schema):
    """The names of the properties of a schema, those that it refers to included."""
    named = bodies.description()["components"]["schemas"]
    if "$ref" in schema:
        return fields(named[schema["$ref"].rpartition("/")[2]])
    return set(schema.get("properties", ())).union(*map(fields, schema.get("allOf", ())))


@pytest.mark.parametrize("path", PATHS)
def test_wrong_types_in_every_field(told, path):
    """If this fails, some field's value is an error of the server, or is taken for what it is not."""
    schema = bodies.description()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    names = fields(schema)
    assert len(names) > 10
    for name in sorted(names):
        for value in VALUES:
            status, _, content = told.send("POST", path, PATHS[path] | {name: value})
            body = PATHS[path] | {name: value}
            right = Draft202012Validator(bodies.description() | schema).is_valid(body)
            assert status in ((200, 400, 404) if right else (400,)), (name, value, content)
            assert status == 200 or json.loads(content)["error"]["message"], (name, value)
    assert told.post(path, **OTHERS | PATHS[path])  # a field that a path does not know is no mistake
    assert told.post("/v1/completions", prompt="<greet>")["choices"][0]["text"] == "Hello world, good bye now"


def test_numbers():
    """If this fails, a client whose language writes 2 as 2.0 is refused."""
    body = bodies.read(b'{"prompt": "x", "max_tokens": 2.0, "temperature": 0.5, "top_p": null}', "/v1/completions")
    assert body == {"prompt": "x", "max_tokens": 2, "temperature": 0.5} and isinstance(body["max_tokens"], int)


def test_refusals_name_the_field():
    with pytest.raises(Answer, match=r"messages\.0\.role: 5 is not of type 'string'") as refused:
        bodies.read(b'{"messages": [{"role": 5}]}', "/v1/chat/completions")
    assert refused.value.status == 400


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", PATHS)
def test_the_description_holds(path, mode, monkeypatch):
    """If this fails, an answer is not what the description says, or the server errs on what a machine thinks of."""
    load_all_checks()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    operation = schemathesis.openapi.from_dict(bodies.description())[path]["POST"]
    # What fits the description may still be too long for the model, or nothing for its template.
    apart = [CHECKS.get_one("positive_data_acceptance")]
    with serving(*TINY, "--num-draft-tokens", "3", "--max-context", "64") as client:

        @settings(LONG)
        @given(operation.as_strategy(generation_mode=mode))
        def run(case):
            if mode == GenerationMode.POSITIVE:  # names of models that are not there are no use
                for name in ("model", "draft_model", "adapters"):
                    case.body.pop(name, None)
            case.call_and_validate(base_url=client.url, excluded_checks=apart, timeout=120)

        run()
        assert client.post("/v1/completions", prompt="Once", max_tokens=2)["choices"]
