"""Writes the value of a tool's parameter as each of mlx-lm's tool parsers reads it, in llguidance's form of Lark.

Knows nothing of how a call begins and ends. What a parser would read as something else is not allowed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from mlx_redrafter.constraints.constraint import for_guidance
from mlx_redrafter.constraints.fence import fenced
from mlx_redrafter.constraints.raw_text import raw_text
from mlx_redrafter.constraints.strictness import LARGEST
from mlx_redrafter.errors import UserError

DEFINITIONS = ("$defs", "definitions")
NOTES = {*DEFINITIONS, "title", "description", "$comment", "default", "examples"}
BESIDE = NOTES | {"type", "properties", "required", "additionalProperties", "$schema"}
EXACT = {"minimum": -LARGEST, "maximum": LARGEST}  # a parser makes a whole number of what has no fraction
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


def listed(rules: Rules, parts: list[tuple[bool, str]], comma: str) -> str:
    """Parts in their order, with commas between those that are there."""
    first = later = '""'
    for needed, part in reversed(parts):
        one = rules.rule(part)
        first = rules.rule(f"{one} {later}" + ("" if needed else f" | {first}"))
        later = rules.rule(f"{json.dumps(comma)} {one} {later}" + ("" if needed else f" | {later}"))
    return first


def takes_more(schema: dict[str, Any]) -> bool:
    """Whether there may be properties that the schema does not list."""
    return schema.get("additionalProperties", True) in (True, {})


def properties(rules: Rules, name: str, schema: dict[str, Any]) -> dict[str, tuple[bool, dict[str, Any]]]:
    """Whether each property is required, and its schema, which brings along the definitions."""
    if word := next((word for word in schema if word not in BESIDE and not word.startswith("x-")), None):
        raise rules.refuse(name, word)
    required, named = schema.get("required", []), dict(schema.get("properties", {}))
    if takes_more(schema):
        named |= {key: {} for key in required if key not in named}
    if unlisted := [key for key in required if key not in named]:
        raise rules.refuse(f"{name}: {unlisted[0]}", "a required property that is not listed")
    definitions = {word: schema[word] for word in DEFINITIONS if word in schema}
    found = {}
    for key, part in named.items():
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


def as_json(rules: Rules, where: str, schema: dict[str, Any], after: str) -> str:
    return f"{rules.json(schema, where)} {rules.spell(after) if after else ''}"


def by_declared_type(rules: Rules, where: str, schema: dict[str, Any], after: str) -> str:
    """As glm47 reads it: text where the type is string, else JSON."""
    if schema.get("type") == "string":
        return rules.text(schema, after, where, stripped=True)
    return as_json(rules, where, schema, after)


def by_kind(rules: Rules, where: str, schema: dict[str, Any], after: str) -> str:
    """As minimax_m2 reads it: what says null is null, and text is only what can be nothing else."""
    kinds = _kinds(schema)
    if kinds - {"null"} == {"string"} or not schema:
        return _nullable(rules, where, schema, after, stripped=True)
    if not kinds or "string" in kinds:
        raise rules.refuse(where, "a value that may be text and something else" if kinds else "a value without a type")
    return as_json(rules, where, (EXACT if "number" in kinds else {}) | schema, after)


def by_one_type(rules: Rules, where: str, schema: dict[str, Any], after: str) -> str:
    """As qwen3_coder reads it: by a type that stands in the schema itself, or where there is none, text."""
    kinds, declared = _kinds(schema), schema.get("type")
    if isinstance(declared, list) and (kinds - SCALARS or "boolean" in kinds):
        raise rules.refuse(where, "a list of these types")
    if not schema or (not isinstance(declared, list) and kinds - {"null"} == {"string"}):
        return _nullable(rules, where, schema, after, stripped=False, guessed=declared is None and bool(schema))
    if declared is None and (not kinds or kinds - {"object", "array", "null"}):
        raise rules.refuse(where, "a value without a type")
    return as_json(rules, where, (EXACT if declared in ("number", "integer") else {}) | schema, after)


def gemma(quote: str, nested: bool) -> Value:
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
            for key, (needed, part) in properties(rules, where, schema).items():
                if not key.isidentifier():
                    raise rules.refuse(f"{where}: {key}", "this name")
                parts.append((needed, f"{json.dumps(key + ':')} {value(rules, f'{where}: {key}', part, '')}"))
            return f'"{{" {listed(rules, parts, ",")} "}}"'
        if nested and kinds == {"array"} and not set(schema) - BESIDE - {"items", "minItems", "maxItems"}:
            definitions = {word: schema[word] for word in DEFINITIONS if word in schema}
            one = rules.rule(value(rules, where, schema.get("items", {"type": "string"}) | definitions, ""))
            least, most = schema.get("minItems", 0), schema.get("maxItems")
            more = f'("," {one}){{{max(0, least - 1)},{"" if most is None else max(0, most - 1)}}}'
            return '"[" "]"' if most == 0 else f'"[" ({one} {more}){"" if least else "?"} "]"'
        raise rules.refuse(where, f"a value of type {' or '.join(sorted(kinds)) or 'any'}")

    return value
