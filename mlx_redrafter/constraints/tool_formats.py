"""Writes a call of a tool as each of mlx-lm's tool parsers reads it, in llguidance's form of Lark.

Knows nothing of the text around a call. What a parser would read as something else is not allowed.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable
from typing import Any

from mlx_redrafter.constraints.tool_values import (
    Rules,
    Value,
    as_json,
    by_declared_type,
    by_kind,
    by_one_type,
    gemma,
    listed,
    properties,
    takes_more,
)

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
        found, parts = properties(rules, name, schema), []
        for named, where in ((name, name), *((key, f"{name}: {key}") for key in found)):
            if not re.fullmatch(r'[^\s<>"]+', named):
                raise rules.refuse(where, "this name")
        for key, (needed, part) in found.items():
            one = f"{rules.spell(before.replace('KEY', key))} {value(rules, f'{name}: {key}', part, after)}"
            parts.append(f"({one}){'' if needed else '?'}")
        if not parts and takes_more(schema):
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
        for key, (needed, part) in properties(rules, name, schema).items():
            if not key.isidentifier() or keyword.iskeyword(key):
                raise rules.refuse(f"{name}: {key}", "this name")
            parts.append((needed, f"{rules.spell(key + equals)} {value(rules, f'{name}: {key}', part, '')}"))
        arguments = listed(rules, parts, comma)
        if not parts and takes_more(schema):
            one = rules.rule(rf"/[a-z]\w*_/ {rules.spell(equals)} {value(rules, name, {'type': 'string'}, '')}")
            arguments = f"({one} ({json.dumps(comma)} {one})*)?"
        return f"{rules.spell(begin.replace('NAME', name))} {arguments} {rules.spell(end)}"

    return call


FORMATS: dict[str, Call] = {
    "json_tools": _quoted_call,
    "longcat": _quoted_call,  # it reads both, and a call without arguments only so
    "mistral": _json_call("NAME[ARGS]", "", r"[\w-]+"),
    "kimi_k2": _numbered_call,
    "kimi_k3": _json_call(
        '<|open|>call tool="NAME" index="1"<|sep|><|open|>json type="object"<|sep|>',
        "<|close|>json<|sep|><|close|>call<|sep|>",
        r"[\w.-]+",
    ),
    "qwen3_coder": _tagged(
        "\n<function=NAME>\n", "<parameter=KEY>\n", "\n</parameter>\n", "</function>\n", by_one_type
    ),
    "glm47": _tagged("NAME\n", "<arg_key>KEY</arg_key>\n<arg_value>", "</arg_value>", "\n", by_declared_type),
    "minimax_m2": _tagged(
        '\n<invoke name="NAME">\n', '<parameter name="KEY">', "</parameter>", "\n</invoke>\n", by_kind
    ),
    "minicpm5": _tagged('"NAME">', '<param name="KEY">', "</param>", "", by_kind),
    "muse_spark": _tagged(
        '\n<atem:invoke name="NAME">\n',
        '<atem:parameter name="KEY">',
        "</atem:parameter>",
        "\n</atem:invoke>\n",
        as_json,
    ),
    "pythonic": _separated("[NAME(", "=", ", ", ")]", as_json, dotted=True),
    "function_gemma": _separated("call:NAME{", ":", ",", "}", gemma("<escape>", nested=False)),
    "gemma4": _separated("call:NAME{", ":", ",", "}", gemma('<|"|>', nested=True)),
}
STOPS: dict[str, tuple[str, ...]] = {  # beside what ends every call
    "kimi_k2": ("<|tool_call_end|>",),
    "kimi_k3": ("<|open|>", "<|close|>"),
    "qwen3_coder": ("</parameter>", "</function>"),
    "glm47": ("</arg_value>",),
    "minimax_m2": ("</parameter>", "</invoke>"),
    "minicpm5": ("</param>", "<![CDATA["),
    "muse_spark": ("</atem:parameter>", "</atem:invoke>"),
}
