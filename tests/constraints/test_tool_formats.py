"""A call written as each tool parser of mlx-lm has it is read by that parser as arguments that are valid."""

import functools
import importlib
import inspect
import itertools
import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlx_redrafter.constraints.matcher import Matcher
from mlx_redrafter.constraints.tool_formats import FORMATS
from mlx_redrafter.constraints.tools import ToolCalls
from mlx_redrafter.constraints.vocabulary import vocabulary
from mlx_redrafter.errors import UserError
from mlx_redrafter.text.loading import EMBEDDED

FLAT = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "code": {"type": "string", "pattern": "^[a-z]{2}(-x)?$"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "height": {"type": "number"},
        "wind": {"type": "boolean"},
    },
    "required": ["city", "days", "wind"],
    "additionalProperties": False,
}
DEEP = {
    "type": "object",
    "$defs": {"at": {"type": "object", "properties": {"x": {"type": "integer", "maximum": 99}}, "required": ["x"]}},
    "properties": {
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        "at": {"type": "object", "properties": {"x": {"type": "integer", "maximum": 99}, "on": {"type": "boolean"}},
            "required": ["x"], "additionalProperties": False},
    },
    "required": ["at", "tags"],
}  # fmt: skip
OPTIONAL = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
MAYBE = {
    "type": "object",
    "properties": {"note": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]}},
    "required": ["note"],
}
ANYTHING = {"type": "object"}
CANNOT = {("function_gemma", "deep")}  # an object has a brace, behind which that parser does not read
SCHEMAS = {"flat": FLAT, "deep": DEEP, "optional": OPTIONAL, "maybe": MAYBE, "anything": ANYTHING}


PARSERS = {parser: importlib.import_module(f"mlx_lm.tool_parsers.{parser}") for parser in FORMATS}
INSIDE = ["<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<|tool_call_begin|>", "<|tool_call_end|>",
    "<|tool_call_argument_begin|>", "[ARGS]", "<escape>", '<|"|>']  # fmt: skip
TAGS = {tag for module in PARSERS.values() for tag in (module.tool_call_start, module.tool_call_end) if tag}


@functools.cache
def embedded(special):
    """The embedded tokenizer, to which all tags are text, or tokens."""
    inner = load_tokenizer(EMBEDDED / "target")._tokenizer
    inner.add_tokens(sorted({*INSIDE, *TAGS} - {"<function name="}) if special else [])
    return inner


def tokenizer_of(parser, special):
    module = PARSERS[parser]
    tags = {"tool_call_start": module.tool_call_start, "tool_call_end": module.tool_call_end}
    return TokenizerWrapper(embedded(special), **tags, tool_parser=module.parse_tool_call)


@functools.cache
def likings(special):
    """Of each token, by a model that likes short tokens, what ends something, and the end best."""
    inner = embedded(special)
    texts = [inner.decode([token]) for token in range(len(inner))]
    found = np.array([(30.0 if text[-1:] in set('"}<>|\n') else 1.0) / max(1, len(text)) for text in texts])
    found[inner.eos_token_id] = 1e6
    return found


def at_random(matcher, special, seed):
    """A text that is allowed; None where it does not end."""
    inner, liking, random, text = embedded(special), likings(special), np.random.default_rng(seed), []
    for _ in range(300):
        allowed = np.unpackbits(matcher.allowed([0], [0]).view(np.uint8), bitorder="little")[: len(inner)] * liking
        token = int(random.choice(len(inner), p=allowed / allowed.sum()))
        matcher.take([token])
        if token == inner.eos_token_id:
            return inner.decode(text, skip_special_tokens=False)
        text.append(token)
    return None


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("parser", FORMATS)
def test_calls_are_read_as_they_were_meant(parser, special):
    """If this fails, a strict tool gets arguments that it cannot take, or a call is lost."""
    tokenizer, finished = tokenizer_of(parser, special), 0
    start, end, size = tokenizer.tool_call_start, tokenizer.tool_call_end, len(embedded(special))
    for seed, (name, schema) in enumerate(SCHEMAS.items()):
        if (parser, name) in CANNOT:
            continue
        constraint = ToolCalls({name: schema}, forced=True).constraint(tokenizer, size)
        text = at_random(Matcher(constraint, tokenizer, size), special, seed)
        if text is None:
            continue
        finished += 1
        assert text.startswith(start)
        inside = text.removeprefix(start).partition(end)[0] if end else text.removeprefix(start)
        calls = tokenizer.tool_parser(inside, [{"function": {"name": name, "parameters": schema}}])
        for call in calls if isinstance(calls, list) else [calls]:
            assert call["name"] == name, inside
            jsonschema.validate(call["arguments"], schema)
    assert finished >= 2


WRITTEN = {  # a call with one argument
    "json_tools": '{"name": "f", "arguments": {"a": VALUE}}',
    "longcat": '{"name": "f", "arguments": {"a": VALUE}}',
    "mistral": 'f[ARGS]{"a": VALUE}',
    "kimi_k2": '<|tool_call_begin|>functions.f:7<|tool_call_argument_begin|>{"a": VALUE}<|tool_call_end|>',
    "qwen3_coder": "\n<function=f>\n<parameter=a>\nVALUE\n</parameter>\n</function>\n",
    "glm47": "f\n<arg_key>a</arg_key>\n<arg_value>VALUE</arg_value>\n",
    "minimax_m2": '\n<invoke name="f">\n<parameter name="a">VALUE</parameter>\n</invoke>\n',
    "minicpm5": '"f"><param name="a">VALUE</param>',
    "muse_spark": '\n<atem:invoke name="f">\n<atem:parameter name="a">VALUE</atem:parameter>\n</atem:invoke>\n',
    "pythonic": "[f(a=VALUE)]",
    "function_gemma": "call:f{a:VALUE}",
    "gemma4": "call:f{a:VALUE}",
}
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


@functools.cache
def matcher_of(parser, schema):
    tokenizer, size = tokenizer_of(parser, False), len(embedded(False))
    constraint = ToolCalls({"f": json.loads(schema)}, forced=True).constraint(tokenizer, size)
    return LLMatcher(vocabulary(tokenizer, size), constraint.grammar, log_level=0)


def allows(parser, schema, text):
    matcher, tokens = matcher_of(parser, json.dumps(schema)), embedded(False).encode(text, add_special_tokens=False)
    matcher.reset()
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("parser", FORMATS)
def test_no_value_ends_its_own_call(parser):
    """If this fails, what a model writes as text is read as other arguments, or as other calls."""
    tokenizer, quote = tokenizer_of(parser, False), QUOTES.get(parser)
    start, end, taken = tokenizer.tool_call_start, tokenizer.tool_call_end, 0

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
        inside = text.removeprefix(start).partition(end)[0] if end else text.removeprefix(start)
        calls = tokenizer.tool_parser(inside, [{"function": {"name": "f", "parameters": schema}}])
        [call] = calls if isinstance(calls, list) else [calls]
        assert (call["name"], call["arguments"]) == ("f", {"a": meant}), text
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
    tokenizer = tokenizer_of(parser, False)
    schema = {"type": "object", "properties": {"a": part}, "required": ["a"]}
    for values, expected in ((right, True), (wrong, False)):
        for value in values:
            text = WRITTEN[parser].replace("VALUE", value)
            text = tokenizer.tool_call_start + text + tokenizer.tool_call_end
            assert allows(parser, schema, text) is expected, value


def test_two_calls_have_two_names_for_kimi():
    """If this fails, a client cannot tell whose result is whose."""
    tokenizer, schema = tokenizer_of("kimi_k2", False), {"type": "object", "properties": {"a": {"type": "integer"}}}
    call = tokenizer.tool_call_start + WRITTEN["kimi_k2"].replace("VALUE", "1") + tokenizer.tool_call_end
    other = call.replace(":7", ":12")
    assert allows("kimi_k2", schema, call + other) and not allows("kimi_k2", schema, call + call.replace(":7", ":x"))
    ids = {tokenizer.tool_parser(text.removeprefix(tokenizer.tool_call_start))[0]["id"] for text in (call, other)}
    assert ids == {"functions.f:7", "functions.f:12"}


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


def test_commas_stand_between_what_is_there():
    """If this fails, a property that is required can be left out, or one that is not cannot."""
    tokenizer, size = tokenizer_of("pythonic", False), 4096
    constraint = ToolCalls({"f": FLAT}, forced=True).constraint(tokenizer, size)
    for text, right in (
        ('city="ab", days=3, wind=true)', True),
        ('city="ab", unit="C", days=3, height=1.5, wind=true)', True),
        ('city="ab")', False),
        ('city="ab", days=3)', False),
        ('city="ab", wind=true', False),
        ('unit="C"', False),
        ("city=3", False),
    ):
        matcher = Matcher(constraint, tokenizer, size)
        tokens = tokenizer.encode(f"<|tool_call_start|>[f({text}", add_special_tokens=False)
        if right:
            matcher.take(tokens)
        else:
            with pytest.raises(UserError):
                matcher.take(tokens)


def test_names_and_words_beside_the_properties():
    for parser, name, schema, words in (
        ("pythonic", "a b", {}, "a b: this name"),
        ("gemma4", "f", {"properties": {"a-b": {}}}, "f: a-b: this name"),
        ("gemma4", "a.b", {}, "a.b: this name"),
        ("mistral", "a.b", {}, "a.b: this name"),
        ("kimi_k2", "a:1", {}, "a:1: this name"),
        ("qwen3_coder", "f", {"properties": {"first name": {}}}, "f: first name: this name"),
        ("minimax_m2", "f>", {}, "f>: this name"),
        ("glm47", "f", {"properties": {"a": False}}, "f: a: a property that may not be there"),
        (
            "minimax_m2",
            "f",
            {"required": ["a"], "additionalProperties": {}, "properties": {"a": {"enum": ["nil"]}}},
            'f: a: the value "nil" of text',
        ),
        (
            "minimax_m2",
            "f",
            {"required": ["a"], "additionalProperties": {"type": "integer"}},
            "f: a: a required property that is not listed",
        ),
        ("glm47", "f", {"anyOf": [{}]}, "f: anyOf"),
        ("glm47", "f", {"properties": {"a": {"$ref": "#"}}}, "f: a: a reference to the arguments"),
    ):
        with pytest.raises(UserError, match=f"tools: {words} cannot be kept with the tool parser {parser}"):
            ToolCalls({name: {"type": "object"} | schema}).constraint(tokenizer_of(parser, False), 4096)
