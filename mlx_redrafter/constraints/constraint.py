"""Checks what a text is asked to be, and says what is wrong with it. Knows nothing of tokens.

A grammar is llguidance's: a JSON schema or a grammar in Lark's form, as JSON. What cannot be
kept is refused by name, so that every finished text is what was asked for.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from mlx_redrafter.constraints.endless import endless
from mlx_redrafter.constraints.room import with_room
from mlx_redrafter.constraints.strictness import check_multiples, tightened
from mlx_redrafter.errors import UserError, one_line

MOST_BYTES = 64 * 1024  # of a schema or a grammar; they are checked in less than half a second
# JSON as most models write it in one line. Space wherever JSON allows it would leave nothing to jump over,
# and a model with nothing to say fills it for ever. A schema's "x-guidance" says otherwise.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# A letter spelt by its number would be a way around the schema of a property.
ONE_SPELLING = {"json_allowed_escapes": 'nrtbf\\"', "json_allow_general_unicode_escapes": False}


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What a text has to be; made by the functions below.

    Args:
        grammar: llguidance's form of it.
        jump_ahead: what the grammar forces is drafted, with a drafter or without; the text is the same.
    """

    grammar: str
    jump_ahead: bool = True


def json_object(name: str = "the JSON object") -> Constraint:
    """Any JSON object. Raises UserError where llguidance is not installed."""
    return json_schema({"type": "object"}, name)


def json_schema(schema: str | dict[str, Any] | bool, name: str = "the JSON schema") -> Constraint:
    """JSON that a schema allows.

    Args:
        schema: of draft 2020-12 or an earlier one, or its JSON text.
        name: in messages.

    Raises:
        UserError: no JSON, no schema, one that nothing or nothing finite fulfils, a feature that cannot be
            kept, which is named, or llguidance is not installed.
    """
    guidance = _guidance()
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        _check_size(text, name)
        parsed = json.loads(text)
        if parsed is True:
            parsed = {}
        if not isinstance(parsed, dict):
            raise UserError(f"{name} is {json.dumps(parsed)[:40]}, expected a JSON object that is a schema")
        grammar = guidance.grammar_from_json_schema(json.dumps(for_guidance(parsed, name)))
        _check(grammar, name)
        if where := endless(parsed):
            raise UserError(f"{name}: {where} requires itself without end")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not JSON ({one_line(error)})") from None
    return Constraint(grammar)


def for_guidance(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """A schema as llguidance takes it to be kept, as JSON is written here. Raises UserError."""
    check_multiples(schema, name)
    guidance = schema.get("x-guidance")
    options = SPACING | (guidance if isinstance(guidance, dict) else {}) | ONE_SPELLING
    return {**tightened(schema, name), "x-guidance": options}


def regex(expression: str, name: str = "the regular expression") -> Constraint:
    """A text that an expression of Rust's `regex` matches as a whole. Raises UserError."""
    _check_size(expression, name)
    grammar = _guidance().grammar_from_regex(expression)
    _check(grammar, name)
    return Constraint(grammar)


def lark(source: str, name: str = "the grammar") -> Constraint:
    """A text that a grammar in llguidance's form of Lark derives from `start`. Raises UserError."""
    _check_size(source, name)
    grammar = _guidance().grammar_from_lark(source)
    _check(grammar, name)
    return Constraint(grammar)


def _guidance() -> Any:
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise UserError("structured output needs llguidance: pip install '.[structured]'") from None
    return LLMatcher


def _check_size(text: str, name: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UserError(f"{name}: not text, expected UTF-8") from None
    if size > MOST_BYTES:
        raise UserError(f"{name} has {size} bytes, expected at most {MOST_BYTES}")


def _check(grammar: str, name: str) -> None:
    guidance = _guidance()
    wrong, messages = with_room(lambda: guidance.validate_grammar_with_warnings(grammar))
    if wrong:
        raise UserError(f"{name}: {one_line(ValueError(messages[0]))}")
