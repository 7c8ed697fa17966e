"""What cannot be kept is refused before a model is asked, in one line that says why."""

import json
import sys

import pytest
from support.schemas import SCHEMAS

from mlx_redrafter.constraints.constraint import json_object, json_schema, lark, regex
from mlx_redrafter.errors import UserError

LARGE = {"type": "object", "properties": {f"field{i:05}": {"type": "string"} for i in range(30_000)}}
DEEP = "[" * 50_000
WRONG = {
    "not JSON": ("{", "not JSON"),
    "deep": (DEEP, "not JSON"),
    "a list": ("[]", "expected a JSON object"),
    "false": (False, "is false"),
    "kind": ({"type": "strin"}, "Invalid type: strin"),
    "unique": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "not": ({"not": {"type": "string"}}, '"not"'),
    "if": ({"if": {"type": "string"}, "then": {"minLength": 3}}, '"if", "then"'),
    "format": ({"type": "string", "format": "foo"}, "Unknown format: foo"),
    "lookahead": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "elsewhere": ({"$ref": "http://example.com/x"}, "http://example.com/x"),
    "nowhere": ({"$ref": "#/$defs/x"}, "'/$defs/x' does not exist"),
    "never": ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
    "endless": ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "without end"),
    "large": (LARGE, "expected at most"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_schema_is_refused(name):
    """If this fails, a schema that cannot be kept is taken, crashes, or holds a server up."""
    schema, words = WRONG[name]
    with pytest.raises(UserError, match="THE NAME") as refused:
        json_schema(schema, "THE NAME")
    assert words in str(refused.value) and "\n" not in str(refused.value) and len(str(refused.value)) < 400


def calls(run):
    """How many functions run until a refusal, Python's own and those below it."""
    count = 0

    def note(frame, event, _):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        with pytest.raises(UserError):
            run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("written", [False, True])
def test_a_large_schema_is_refused_unread(written):
    """If this fails, a megabyte of schema keeps a server busy before it is refused."""
    schema = json.dumps(LARGE) if written else LARGE
    assert calls(lambda: json_schema(schema)) < 100


def test_work_grows_with_an_endless_schema_and_no_faster():
    """If this fails, a schema that goes round in many circles keeps a server busy before it is refused."""

    def circles(n):
        steps = {
            f"n{i}": {
                "type": "object",
                "properties": {"a": {"$ref": f"#/$defs/n{(i + 1) % n}"}, "b": {"$ref": f"#/$defs/n{i * 7 % n}"}},
                "required": ["a", "b"],
            }
            for i in range(n)
        }
        return {"$defs": steps, "$ref": "#/$defs/n0"}

    few, many = (calls(lambda n=n: json_schema(circles(n))) for n in (50, 400))
    assert few > 50 and many < 10 * few


def test_wrong_expressions_and_grammars_are_refused():
    """If this fails, a mistake in an expression or a grammar is found by the model."""
    for make, wrong in (
        (regex, "["),
        (regex, "(?=a)b"),
        (lark, "start: ("),
        (lark, 'foo: "a"'),
        (lark, "x" * 300_000),
        (regex, "\udcff"),
        (lark, "\udcff"),
    ):
        with pytest.raises(UserError, match="THE NAME"):
            make(wrong, "THE NAME")


def test_right_ones_are_taken():
    """If this fails, a usual schema is refused."""
    for schema in (*SCHEMAS.values(), {}, True, json.dumps({"anyOf": [{"type": "null"}, {"type": "array"}]})):
        json_schema(schema)
    json_object()
    regex("(yes|no)[0-9]+")
    lark('start: "a" | "b" start')
