"""What a parameter may be in a call is what a parser of mlx-lm reads back, and what it cannot hold is refused."""

import inspect
import itertools
import json
import re
from typing import Any

import pytest
from support.tool_calls import PARSERS, WRITTEN, allows, between_tags, called, tokenizer_of

from mlx_redrafter.constraints.tool_formats import FORMATS
from mlx_redrafter.constraints.tools import ToolCalls
from mlx_redrafter.errors import UserError

QUOTES = {
    "qwen3_coder": "",
    "glm47": "",
    "minimax_m2": "",
    "minicpm5": "",
    "function_gemma": "<escape>",
    "gemma4": '<|"|>',
}
AROUND = [
    "xTAGy",
    "TAG",
    "<![CDATA[TAG]]>",
    "xTAG<parameter=b>9TAG",
    'xTAG<param name="b">9TAG',
    "x\nTAG\n",
    "[1]TAG",
    "<TAG",
]


def hostile(parser):
    """Texts with the tags that the parser's source speaks of."""
    module = PARSERS[parser]
    source = inspect.getsource(module).replace("\\", "")
    tags = {
        *re.findall(r"</?[a-z:|_]+>|<[|]tool[a-z_|]*>", source),
        module.tool_call_start,
        module.tool_call_end,
        "}",
        "]",
    }
    return [around.replace("TAG", tag) for around, tag in itertools.product(AROUND, sorted(tags))] + [
        "[1]",
        "null",
        " a",
    ]


@pytest.mark.parametrize("parser", FORMATS)
def test_no_value_ends_its_own_call(parser):
    """If this fails, what a model writes as text is read as other arguments, or as other calls."""
    start, end, quote, taken = PARSERS[parser].tool_call_start, PARSERS[parser].tool_call_end, QUOTES.get(parser), 0

    def as_text(text):
        return json.dumps(text) if quote is None else f"{quote}{text}{quote}"

    tried: list[tuple[Any, Any, str]] = []
    for text in ["a < b", *hostile(parser)]:
        tried.append(({"type": "string"}, text, as_text(text)))
        null = as_text(text) == "null"
        tried.append(({"anyOf": [{"type": "string"}, {"type": "null"}]}, None if null else text, as_text(text)))
    if "gemma" not in parser:
        for text in ["a < b", *hostile(parser)]:
            tried += [({"type": "array"}, [text], json.dumps([text]))]
            tried += [({"type": "object"}, value, json.dumps(value)) for value in ({text: 1}, {"b": [text]})]
            if quote is None:
                tried += [({}, text, json.dumps(text)), ({"type": ["string", "null"]}, text, json.dumps(text))]
    for part, meant, written in tried:
        schema = {"type": "object", "properties": {"a": part}, "required": ["a"], "additionalProperties": False}
        text = start + WRITTEN[parser].replace("VALUE", written) + end
        if not allows(parser, schema, text):
            assert "a < b" not in written or (quote == "" and "anyOf" in part), written
            continue
        taken += 1
        assert called(parser, between_tags(parser, text), "f", schema) == ("f", {"a": meant}), text
    assert taken > 10


@pytest.mark.parametrize(
    ("parser", "part", "right", "wrong"),
    [
        ("minimax_m2", {"enum": ["a", "bb", "ccc"], "minLength": 2, "maxLength": 2}, ["bb"], ["a", "ccc"]),
        ("minimax_m2", {"type": ["string", "null"], "enum": ["a"]}, ["a"], ["null", "b"]),
        ("qwen3_coder", {"type": "string", "enum": ["a", None]}, ["a"], ["null"]),
        ("qwen3_coder", {"anyOf": [{"type": "string"}, {"type": "null"}]}, ["a", "null", "a[1]"], ["[1]", ' {"a": 1}']),
        ("qwen3_coder", {"type": ["string", "null"]}, ['"a"', "null"], ['"</function>"', "a"]),
        ("minicpm5", {"type": "number"}, ["1.5"], ["1e400"]),
    ],
)
def test_what_stands_beside_a_choice_counts(parser, part, right, wrong):
    """If this fails, a text has a value that its schema does not allow."""
    start, end = PARSERS[parser].tool_call_start, PARSERS[parser].tool_call_end
    schema = {"type": "object", "properties": {"a": part}, "required": ["a"]}
    for values, expected in ((right, True), (wrong, False)):
        for value in values:
            text = start + WRITTEN[parser].replace("VALUE", value) + end
            assert allows(parser, schema, text) is expected, value


@pytest.mark.parametrize(
    ("parser", "part", "words"),
    [
        ("qwen3_coder", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "a value without a type"),
        ("qwen3_coder", {"type": ["boolean", "string"]}, "a list of these types"),
        ("qwen3_coder", {"anyOf": [{"type": "string"}, {"type": "null"}], "minLength": 2}, "minLength beside anyOf"),
        ("qwen3_coder", {"enum": ["[1]"]}, 'the value "[1]" of text'),
        ("minimax_m2", {"anyOf": [{"type": "string"}, {"enum": ["a", None]}]}, "a choice of texts"),
        ("minimax_m2", {"type": "string", "enum": ["a", "b"], "pattern": "^a$"}, "more than a choice of values"),
        ("minimax_m2", {"type": "string", "enum": ["a"], "minLength": 2}, "a choice of no value"),
        ("minicpm5", {"type": "string", "enum": ["<![CDATA["]}, 'the value "<![CDATA[" of text'),
        ("glm47", {"type": "object", "properties": {"</arg_value>": {}}}, "</arg_value> in the schema"),
        ("glm47", {"enum": [["</tool_call>"]]}, "</tool_call> in the schema"),
        ("pythonic", {"type": "object", "patternProperties": {"a": {}}}, "patternProperties"),
        ("glm47", {"type": "string", "format": "date"}, "format of text"),
        ("glm47", {"type": "string", "anyOf": [{"minLength": 1}]}, "anyOf of text"),
        ("glm47", {"type": "string", "pattern": "a|b"}, 'the pattern "a|b" of text'),
        ("minimax_m2", {"type": ["string", "integer"]}, "a value that may be text and something else"),
        ("minimax_m2", {"type": "string", "enum": ["null"]}, 'the value "null" of text'),
        ("function_gemma", {"type": "array"}, "a value of type array"),
    ],
)
def test_what_a_format_cannot_keep_is_named(parser, part, words):
    """If this fails, a call is held to less than its schema says."""
    tokenizer = tokenizer_of(parser, False)
    with pytest.raises(UserError, match="tools: f: a: ") as refused:
        ToolCalls({"f": {"type": "object", "properties": {"a": part}}}).constraint(tokenizer, 4096)
    assert words in str(refused.value) and "\n" not in str(refused.value)
