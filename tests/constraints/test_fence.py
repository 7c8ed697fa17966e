"""JSON that a fence keeps in, and the texts that it keeps out at every place."""

import json
import re

import pytest
from llguidance import LLMatcher

from mlx_redrafter.constraints.constraint import json_schema
from mlx_redrafter.constraints.fence import fenced, free_of
from mlx_redrafter.constraints.vocabulary import vocabulary

STOPS = ["</value>", "</call>", "<![CDATA["]
END = "a</call>b"
TREE = {
    "$defs": {"t": {"type": "object", "properties": {"n": {"type": "string"}, "c": {"items": {"$ref": "#/$defs/t"}}}}},
    "$ref": "#/$defs/t",
}
CASES = [  # a schema, JSON that it allows, JSON that it allows without a fence alone
    ({}, ["a < b</div>", {"a": ["<"]}, 1, None], [END, [END], {END: 1}, {"a": {"b": END}}]),
    ({"description": "any"}, [["</call"]], [END, [END], {END: 1}]),
    ({"type": ["string", "null"]}, [None, "x"], [END]),
    ({"type": "array"}, [["x", 1]], [[END], [[END]]]),
    ({"type": "array", "items": [{"type": "string"}]}, [["x", 1]], [[END], ["x", END]]),
    ({"type": "object"}, [{"a": {"b": "<"}}], [{END: 1}, {"a": END}, {"a": {END: 1}}]),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, [{"a": 1}], [{END: 1}]),
    ({"type": "object", "properties": {"a": {}}, "additionalProperties": False}, [{"a": "b"}], [{"a": END}]),
    ({"anyOf": [{"type": "string"}, {"type": "array", "items": True}]}, ["a", ["a"]], [END, [END]]),
    ({"allOf": [{"$ref": "#/$defs/o"}], "$defs": {"o": {"type": "object"}}}, [{"a": "b"}], [{"a": END}, {END: 1}]),
    (TREE, [{"n": "a", "c": [{"n": "b"}], "z": {"k": 1}}], [{"n": END}, {"c": [{"n": END}]}, {END: 1}, {"z": END}]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "right", "wrong"), CASES)
def test_a_fence_keeps_out_what_ends_a_call(pair, schema, right, wrong):
    """If this fails, a call ends in the midst of its arguments, or a schema allows less than it says."""
    known = vocabulary(pair[2], 4096)

    def allows(schema, value):
        text = json.dumps(value)
        matcher = LLMatcher(known, json_schema(schema).grammar, log_level=0)
        tokens = known.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    for value in right:
        assert allows(fenced(schema, STOPS), value), value
    for value in wrong:
        assert allows(schema, value) and not allows(fenced(schema, STOPS), value), value


def test_texts_free_of_stops():
    expression = re.compile(free_of(STOPS))
    for text in ("", "<", "<<", "</", "</value", "</valu></div>", "<![CDATA", "a<b>c", "</<value>"):
        assert expression.search(text), text
    for text in (f"{before}{stop}{after}" for stop in STOPS for before in ("", "a", "<", "</") for after in ("", "<a")):
        assert not expression.search(text), text
