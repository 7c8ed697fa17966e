"""What llguidance would let through of a schema, and what has to stay."""

import json

import pytest
from llguidance import LLMatcher

from mlx_redrafter.constraints.constraint import json_schema
from mlx_redrafter.constraints.strictness import javascript, tightened
from mlx_redrafter.constraints.vocabulary import vocabulary
from mlx_redrafter.errors import UserError

OPEN = {"properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
CASES = [  # a schema, texts that it allows, texts that it does not
    ({"format": "date"}, ['"2024-02-29"', '"2000-02-29"', '"2023-12-31"', "7"], ['"2023-02-29"', '"2100-02-29"']),
    ({"format": "time"}, ['"23:59:59Z"', '"08:30:06.283185Z"'], ['"22:59:60Z"']),
    ({"format": "date-time"}, ['"2024-02-29T12:30:00Z"'], ['"2023-02-29T12:30:00Z"', '"1998-12-31T23:58:60Z"']),
    ({"format": "date", "allOf": [{"pattern": "8$"}]}, ['"2023-02-28"'], ['"2023-02-27"']),
    ({"format": "hostname"}, ['"a-b.example.com"'], ['"xn--x"', json.dumps(".".join(["a" * 60] * 5))]),
    ({"pattern": "^a.$"}, ['"ab"', "1"], ['"a\\r"', '"a\u2028"']),
    ({"pattern": r"^\s\S$"}, ['" a"'], ['"\x85a"', '" \ufeff"']),
    ({"pattern": r"^[^\s]\.[.]\\S$"}, ['"a..\\\\S"'], ['"\ufeff..\\\\S"', '"abb\\\\S"']),
    ({"pattern": "^[[&&a]$"}, ['"["', '"&"', '"a"'], ['"b"']),
    ({"pattern": "^[^ --0]$"}, ['"."', '"1"'], ['"+"', '"-"', '"0"', '" "']),
    ({"pattern": r"^[--/a\d-]$"}, ['"."', '"-"', '"7"', '"a"'], ['"+"', '"b"']),
    ({"pattern": "^(b|[]a])$"}, ['"b"'], ['"]"', '"a"']),
    ({"pattern": "^[^]$"}, ['"]"', '"a"', '"\\n"'], ['""']),
    ({"patternProperties": {"^a.$": False}}, ['{"a\u2028": 1}'], ['{"ab": 1}']),
    (OPEN, ['{"a": 1, "b": "x"}'], ['{"\\u0061": "x"}', '{"a": "x"}']),
    (OPEN | {"x-guidance": {"json_allowed_escapes": "u"}}, ['{"a": 1}'], ['{"\\u0061": "x"}']),
    ({"type": "number", "multipleOf": 0.25, "maximum": 2**53}, ["0.75", "-1", "9007199254740992"], ["0.8"]),
    ({"type": "integer", "multipleOf": 25_000_000}, ["50000000"], ["5000000"]),
    ({"multipleOf": 0.01, "allOf": [{"multipleOf": 15}, {"multipleOf": 0.2}]}, ["30"], ["5", "0.2"]),
    ({"type": "object", "minProperties": 1}, ['{"b": 1}'], ["{}"]),
    ({"properties": {"format": {"const": "date"}}}, ['{"format": "date"}'], ['{"format": "2024-02-28"}']),
]
REFUSED = {
    "contentEncoding": {"properties": {"a": {"contentEncoding": "base64"}}},
    "contentMediaType": {"items": [{"contentMediaType": "application/json"}]},
    "minProperties": {"type": "object", "minProperties": 2, "required": []},
    "minimum": {"type": "integer", "minimum": -(2**63), "maximum": -(2**63)},
    "exclusiveMaximum": {"items": {"type": "number", "exclusiveMaximum": 1e300}},
    "multipleOf": {"properties": {"a": {"type": "number", "multipleOf": 0.12345678}}},
    "multipleOf ": {"properties": {"default": {"type": "integer", "multipleOf": 999983}}},
    "a finite number": {"multipleOf": float("inf")},
    "common multiple": {"$defs": {"a": {"multipleOf": 997}, "b": {"multipleOf": 991}}},
    "control characters": {"enum": ["a\x01"]},
    "name of a property": {"properties": {"\x7f": {}}},
}


@pytest.mark.parametrize(("schema", "right", "wrong"), CASES)
def test_what_a_schema_allows(pair, schema, right, wrong):
    """If this fails, a finished text is not what was asked for, or cannot be what was asked for."""
    known, grammar = vocabulary(pair[2], 4096), json_schema(schema).grammar
    for texts, expected in ((right, True), (wrong, False)):
        for text in texts:
            tokens, matcher = known.tokenize_str(text), LLMatcher(known, grammar, log_level=0)
            taken = matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
            assert taken is expected, text


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_kept_is_named(words):
    """If this fails, a text is called right that is not."""
    with pytest.raises(UserError, match=f"THE NAME: .*{words}"):
        json_schema(REFUSED[words], "THE NAME")


def test_the_rest_stays():
    """If this fails, data is taken for schemas, or a usual schema is refused."""
    kept = [
        {"const": {"pattern": ".", "format": "date"}, "description": "a\x01"},
        {"minProperties": 3, "additionalProperties": False, "properties": {"a": {}, "b": {}, "c": {}}},
        {"minProperties": 3, "required": ["a", "b"]},
        {"enum": ["a\n\t\\u0001"], "required": 5, "properties": 5, "minProperties": 5},
    ]
    assert tightened(kept, "it") == kept
    assert javascript(r"^(a|[b-d])+\d\w\\$") == r"^(a|[b-d])+\d\w\\$"
