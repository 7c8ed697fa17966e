"""A call written as each tool parser of mlx-lm has it is read by that parser as arguments that are valid."""

import functools

import jsonschema
import numpy as np
import pytest
from support.tool_calls import PARSERS, WRITTEN, allows, between_tags, called, embedded, tokenizer_of

from mlx_redrafter.constraints.matcher import Matcher
from mlx_redrafter.constraints.tool_formats import FORMATS
from mlx_redrafter.constraints.tools import ToolCalls
from mlx_redrafter.errors import UserError

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
    tokenizer, size, finished = tokenizer_of(parser, special), len(embedded(special)), 0
    for seed, (name, schema) in enumerate(SCHEMAS.items()):
        if (parser, name) in CANNOT:
            continue
        constraint = ToolCalls({name: schema}, forced=True).constraint(tokenizer, size)
        text = at_random(Matcher(constraint, tokenizer, size), special, seed)
        if text is None:
            continue
        finished += 1
        assert text.startswith(PARSERS[parser].tool_call_start)
        read, arguments = called(parser, between_tags(parser, text), name, schema)
        assert read == name, text
        jsonschema.validate(arguments, schema)
    assert finished >= 2


def test_two_calls_have_two_names_for_kimi():
    """If this fails, a client cannot tell whose result is whose."""
    tokenizer, schema = tokenizer_of("kimi_k2", False), {"type": "object", "properties": {"a": {"type": "integer"}}}
    call = tokenizer.tool_call_start + WRITTEN["kimi_k2"].replace("VALUE", "1") + tokenizer.tool_call_end
    other = call.replace(":7", ":12")
    assert allows("kimi_k2", schema, call + other) and not allows("kimi_k2", schema, call + call.replace(":7", ":x"))
    ids = {tokenizer.tool_parser(text.removeprefix(tokenizer.tool_call_start))[0]["id"] for text in (call, other)}
    assert ids == {"functions.f:7", "functions.f:12"}


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
