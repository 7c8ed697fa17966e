"""Writes a call of a tool as each of mlx-lm's tool parsers reads it, in llguidance's form of Lark.

Knows nothing of the text around a call. What a parser would read as something else is not allowed.
"""

from __future__ import annotations

import dataclasses
import json
import keyword
import re
from collections.abc import Callable
from typing import Any

from mlx_redrafter.constraints.constraint import for_guidance
from mlx_redrafter.constraints.fence import fenced
from mlx_redrafter.constraints.raw_text import raw_text
from mlx_redrafter.errors import UserError

DEFINITIONS = ("$defs", "definitions")
NOTES = {*DEFINITIONS, "title", "description", "$comment", "default", "examples"}
BESIDE = NOTES | {"type", "properties", "required", "additionalProperties", "$schema"}
EXACT = {"minimum": -(2**53), "maximum": 2**53}  # a parser makes a whole number of what has no fraction
SCALARS = {"string", "integer", "number", "boolean", "null"}


@dataclasses.dataclass
class Rules:
    """The grammar's rules beside those of the text, and how literal text is written.

    Args:
        parser: the name of mlx-lm's parser.
        spell: text in Lark's form, special tokens in it as such.
        stops: what the parser, or who cuts out the call for it, would take for an end wherever it stands.
    """

    parser: str
    spell: Callable[[str], str]
    stops: tuple[str, ...]
    lines: list[str] = dataclasses.field(default_factory=list)

    def rule(self, body: str, lazy: bool = False, terminal: bool = False) -> str:
        """The name of a new rule."""
        name = f"{'T' if terminal else 'r'}{len(self.lines)}"
        self.lines.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name

    def json(self, schema: dict[str, Any], where: str) -> str:
        text = json.dumps(schema, ensure_ascii=False)
        if self.stops and '"patternProperties": ' in text:
            raise self.refuse(where, "patternProperties")
        if stop := next((stop for stop in self.stops if stop in text), None):
            raise self.refuse(where, f"{stop} in the schema")
        return self.rule(f"%json {json.dumps(for_guidance(fenced(schema, self.stops), f'tools: {where}'))}")

    def text(self, schema: dict[str, Any], end: str, where: str, *more: str, **reading: bool) -> str:
        """Text without quotes, and what ends it, without more stops; `reading` is raw_text's."""
        stops = tuple(dict.fromkeys((end, *more, *self.stops)))
        content = self.rule(raw_text(schema, stops, f"tools: {where}", self.parser, **reading), terminal=True)
        if (closing := self.spell(end)) == json.dumps(end):
            return self.rule(f"{content} {closing}", lazy=True)
        return f"{content} {closing}"

    def refuse(self, where: str, what: str) -> UserError:
        return UserError(f"tools: {where}: {what} cannot be kept with the tool parser {self.parser}")


Value = Callable[[Rules, str, dict[str, Any], str], str]  # rules, where, a property's schema, what follows it
Call = Callable[[Rules, str, dict[str, Any]], str]  # rules, the tool's name, its schema


def _json_call(begin: str, end: str, names: str = ".*") -> Call:
    def call(rules: Rules, name: str, schema: dict[str, Any]) -> str:
        if not re.fullmatch(names, name):
            raise rules.refuse(name, "this name")
        return f"{rules.spell(begin.replace('NAME', name))} {rules.json(schema, name)} {rules.spell(end)}"

    return call


def _numbered_call(rules: Rules, name: str, schema: dict[str, Any]) -> str:
    """As kimi_k2 has it; name and number are the call's id."""
    call = _json_call("<|tool_call_argument_begin|>", "<|tool_call_end|>", r"[\w.-]+")(rules, name, schema)
    return f"{rules.spell(f'<|tool_call_begin|>functions.{name}:')} /[0-9]{{1,3}}/ {call}"


def _quoted_call(rules: Rules, name: str, schema: dict[str, Any]) -> str:
    call = _json_call('{"name": NAME, "arguments": ', "}")(rules, json.dumps(name), schema)
    return rf"/\n?/ {call} /\n?/"


def _tagged(begin: str, before: str, after: str, end: str, value: Value) -> Call:
    """Arguments one after the other, each between tags; `before` has the KEY."""

    def call(rules: Rules, name: str, schema: dict[str, Any]) -> str:
        found, parts = _properties(rules, name, schema), []
        for named, where in ((name, name), *((key, f"{name}: {key}") for key in found)):
            if not re.fullmatch(r'[^\s<>"]+', named):
                raise rules.refuse(where, "this name")
        for key, (needed, part) in found.items():
            one = f"{rules.spell(before.replace('KEY', key))} {value(rules, f'{name}: {key}', part, after)}"
            parts.append(f"({one}){'' if needed else '?'}")
        if not parts and _takes_more(schema):
            opening, closing = (rules.spell(text) for text in before.split("KEY"))
            parts = [rf"({opening} /[\w-]+/ {closing} {value(rules, name, {}, after)})*"]
        return f"{rules.spell(begin.replace('NAME', name))} {' '.join(parts)} {rules.spell(end)}"

    return call


def _separated(begin: str, equals: str, comma: str, end: str, value: Value, dotted: bool = False) -> Call:
    """Arguments with commas between them; the tool's name may have dots where `dotted` says so."""

    def call(rules: Rules, name: str, schema: dict[str, Any]) -> str:
        words = name.split(".") if dotted else [name]
        if not all(word.isidentifier() and not keyword.iskeyword(word) for word in words):
            raise rules.refuse(name, "this name")
        parts = []
        for key, (needed, part) in _properties(rules, name, schema).items():
            if not key.isidentifier() or keyword.iskeyword(key):
                raise rules.refuse(f"{name}: {key}", "this name")
            parts.append((needed, f"{rules.spell(key + equals)} {value(rules, f'{name}: {key}', part, '')}"))
        arguments = _listed(rules, parts, comma)
        if not parts and _takes_more(schema):
            one = rules.rule(rf"/[a-z]\w*_/ {rules.spell(equals)} {value(rules, name, {'type': 'string'}, '')}")
            arguments = f"({one} ({json.dumps(comma)} {one})*)?"
        return f"{rules.spell(begin.replace('NAME', name))} {arguments} {rules.spell(end)}"

    return call


def _listed(rules: Rules, parts: list[tuple[bool, str]], comma: str) -> str:
    """Parts in their order, with commas between those that are there."""
    first = later = '""'
    for needed, part in reversed(parts):
        one = rules.rule(part)
        first = rules.rule(f"{one} {later}" + ("" if needed else f" | {first}"))
        later = rules.rule(f"{json.dumps(comma)} {one} {later}" + ("" if needed else f" | {later}"))
    return first


def _takes_more(schema: dict[str, Any]) -> bool:
    """Whether there may be properties that the schema does not list."""
    return schema.get("additionalProperties", True) in (True, {})


def _properties(rules: Rules, name: str, schema: dict[str, Any]) -> dict[str, tuple[bool, dict[str, Any]]]:
    """Whether each property is required, and its schema, which brings along the definitions."""
    if word := next((word for word in schema if word not in BESIDE and not word.startswith("x-")), None):
        raise rules.refuse(name, word)
    required, properties = schema.get("required", []), dict(schema.get("properties", {}))
    if _takes_more(schema):
        properties |= {key: {} for key in required if key not in properties}
    if unlisted := [key for key in required if key not in properties]:
        raise rules.refuse(f"{name}: {unlisted[0]}", "a required property that is not listed")
    definitions = {word: schema[word] for word in DEFINITIONS if word in schema}
    found = {}
    for key, part in properties.items():
        if '"$ref": "#"' in (text := json.dumps(part)) or '"$ref": "#/properties' in text:
            raise rules.refuse(f"{name}: {key}", "a reference to the arguments")
        if part is False:
            raise rules.refuse(f"{name}: {key}", "a property that may not be there")
        found[key] = key in required, ({} if part is True else part) | definitions
    return found


def _kinds(schema: dict[str, Any]) -> set[str]:
    """The types that a schema names, in itself or in what it chooses from."""
    kinds = schema.get("type", [])
    found = set(kinds if isinstance(kinds, list) else [kinds])
    if not found and (values := schema.get("enum") or ([schema["const"]] if "const" in schema else [])):
        names = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
        found = {names.get(type(value), "null") for value in values}
    return found.union(*(_kinds(part) for part in schema.get("anyOf", ()) if isinstance(part, dict)))


def _text_or_null(rules: Rules, where: str, schema: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Of a schema that allows text or null, the part about text, and whether null may stand there."""
    null = "null" in _kinds(schema) and _allows_null(schema)
    while "anyOf" in schema:
        if word := next((word for word in schema if word not in NOTES | {"anyOf"}), None):
            raise rules.refuse(where, f"{word} beside anyOf")
        texts = [part for part in schema["anyOf"] if isinstance(part, dict) and "string" in _kinds(part)]
        if len(texts) != 1:
            raise rules.refuse(where, "a choice of texts")
        schema = texts[0]
    return schema, null


def _nullable(rules: Rules, where: str, schema: dict[str, Any], after: str, **reading: bool) -> str:
    """Text, or null where the schema allows it, and what follows either."""
    part, null = _text_or_null(rules, where, schema)
    text = rules.text(part, after, where, **reading)
    return f"({text} | {rules.spell('null' + after)})" if null else text


def _allows_null(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return bool(schema)
    choices = schema.get("const") is None and None in schema.get("enum", [None])
    return choices and "null" in schema.get("type", "null") and any(map(_allows_null, schema.get("anyOf", [True])))


def _as_json(rules: Rules, where: str, schema: dict[str, Any], after: str) -> str:
    return f"{rules.json(schema, where)} {rules.spell(after) if after else ''}"


def _by_declared_type(rules: Rules, where: str, schema: dict[str, Any], after: str) -> str:
    """As glm47 reads it: text where the type is string, else JSON."""
    if schema.get("type") == "string":
        return rules.text(schema, after, where, stripped=True)
    return _as_json(rules, where, schema, after)


def _by_kind(rules: Rules, where: str, schema: dict[str, Any], after: str) -> str:
    """As minimax_m2 reads it: what says null is null, and text is only what can be nothing else."""
    kinds = _kinds(schema)
    if kinds - {"null"} == {"string"} or not schema:
        return _nullable(rules, where, schema, after, stripped=True)
    if not kinds or "string" in kinds:
        raise rules.refuse(where, "a value that may be text and something else" if kinds else "a value without a type")
    return _as_json(rules, where, (EXACT if "number" in kinds else {}) | schema, after)


def _by_one_type(rules: Rules, where: str, schema: dict[str, Any], after: str) -> str:
    """As qwen3_coder reads it: by a type that stands in the schema itself, or where there is none, text."""
    kinds, declared = _kinds(schema), schema.get("type")
    if isinstance(declared, list) and (kinds - SCALARS or "boolean" in kinds):
        raise rules.refuse(where, "a list of these types")
    if not schema or (not isinstance(declared, list) and kinds - {"null"} == {"string"}):
        return _nullable(rules, where, schema, after, stripped=False, guessed=declared is None and bool(schema))
    if declared is None and (not kinds or kinds - {"object", "array", "null"}):
        raise rules.refuse(where, "a value without a type")
    return _as_json(rules, where, (EXACT if declared in ("number", "integer") else {}) | schema, after)


def _gemma(quote: str, nested: bool) -> Value:
    """Text between quotes of their own, everything else as JSON has it, names without quotes."""

    def value(rules: Rules, where: str, schema: dict[str, Any], after: str) -> str:
        kinds = _kinds(schema)
        if kinds - {"null"} == {"string"}:
            part, null = _text_or_null(rules, where, schema)
            braces = () if nested else ("}",)
            text = f"{rules.spell(quote)} {rules.text(part, quote, where, *braces, stripped=False)}"
            return f"({text} | {json.dumps('null')})" if null else text
        if kinds and kinds <= SCALARS - {"string"}:
            return rules.json(schema, where)
        if nested and kinds == {"object"}:
            parts = []
            for key, (needed, part) in _properties(rules, where, schema).items():
                if not key.isidentifier():
                    raise rules.refuse(f"{where}: {key}", "this name")
                parts.append((needed, f"{json.dumps(key + ':')} {value(rules, f'{where}: {key}', part, '')}"))
            return f'"{{" {_listed(rules, parts, ",")} "}}"'
        if nested and kinds == {"array"} and not set(schema) - BESIDE - {"items", "minItems", "maxItems"}:
            definitions = {word: schema[word] for word in DEFINITIONS if word in schema}
            one = rules.rule(value(rules, where, schema.get("items", {"type": "string"}) | definitions, ""))
            least, most = schema.get("minItems", 0), schema.get("maxItems")
            more = f'("," {one}){{{max(0, least - 1)},{"" if most is None else max(0, most - 1)}}}'
            return '"[" "]"' if most == 0 else f'"[" ({one} {more}){"" if least else "?"} "]"'
        raise rules.refuse(where, f"a value of type {' or '.join(sorted(kinds)) or 'any'}")

    return value


FORMATS: dict[str, Call] = {
    "json_tools": _quoted_call,
    "longcat": _quoted_call,  # it reads both, and a call without arguments only so
    "mistral": _json_call("NAME[ARGS]", "", r"[\w-]+"),
    "kimi_k2": _numbered_call,
    "qwen3_coder": _tagged(
        "\n<function=NAME>\n", "<parameter=KEY>\n", "\n</parameter>\n", "</function>\n", _by_one_type
    ),
    "glm47": _tagged("NAME\n", "<arg_key>KEY</arg_key>\n<arg_value>", "</arg_value>", "\n", _by_declared_type),
    "minimax_m2": _tagged(
        '\n<invoke name="NAME">\n', '<parameter name="KEY">', "</parameter>", "\n</invoke>\n", _by_kind
    ),
    "minicpm5": _tagged('"NAME">', '<param name="KEY">', "</param>", "", _by_kind),
    "muse_spark": _tagged(
        '\n<atem:invoke name="NAME">\n',
        '<atem:parameter name="KEY">',
        "</atem:parameter>",
        "\n</atem:invoke>\n",
        _as_json,
    ),
    "pythonic": _separated("[NAME(", "=", ", ", ")]", _as_json, dotted=True),
    "function_gemma": _separated("call:NAME{", ":", ",", "}", _gemma("<escape>", nested=False)),
    "gemma4": _separated("call:NAME{", ":", ",", "}", _gemma('<|"|>', nested=True)),
}
STOPS: dict[str, tuple[str, ...]] = {  # beside what ends every call
    "kimi_k2": ("<|tool_call_end|>",),
    "qwen3_coder": ("</parameter>", "</function>"),
    "glm47": ("</arg_value>",),
    "minimax_m2": ("</parameter>", "</invoke>"),
    "minicpm5": ("</param>", "<![CDATA["),
    "muse_spark": ("</atem:parameter>", "</atem:invoke>"),
}
