"""Adds to a JSON schema what llguidance leaves out of it, or says what cannot be kept. Knows nothing of grammars.

Formats have the exceptions of their RFCs, expressions are JavaScript's, and a name can be spelt in one way alone.
"""

from __future__ import annotations

import decimal
import json
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from mlx_redrafter.errors import UserError

DATA = ("const", "enum", "default", "examples")  # JSON that is no schema
BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
LARGEST = 2**53  # llguidance rounds whole numbers above, and ends the process at the smallest of 64 bits
UNKEPT = ("contentEncoding", "contentMediaType", "contentSchema")  # what a string holds is not looked into
# llguidance takes 29 February of every year, and a leap second at any time.
_DATE = (
    "^(?:[0-9]{4}-(?:0[13-9]|1[0-2])|[0-9]{4}-02-(?:[01]|2[0-8])"
    "|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
_TIME = "[0-9]:[0-9]{2}:[0-5]"
FORMATS: dict[str, dict[str, Any]] = {
    "date": {"pattern": _DATE},
    "time": {"pattern": _TIME},
    "date-time": {"allOf": [{"pattern": _DATE}, {"pattern": _TIME}]},
    # Two hyphens stand only in names in punycode, whose rules are Unicode's.
    "hostname": {"pattern": "^(?:[^-]|-[^-])*$", "maxLength": 253},
}
_UNSPELT = re.compile(r"(?<!\\)(?:\\\\)*\\u00[01]|\x7f")  # in JSON, which has a letter for some control characters
_TOKEN = re.compile(r"\[(?P<no>\^?)(?P<body>(?:\\.|[^\]\\])*)\]|\\.|.", re.DOTALL)  # a class, or one thing
_LETTER = r"(?:\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|u\{[0-9a-fA-F]+\}|c[a-zA-Z]|[^dDsSwWpP])|[^\\])"
_RANGE = re.compile(rf"({_LETTER})-({_LETTER})|(\\?.)", re.DOTALL)  # in a class, or one thing
_JAVASCRIPT = {r"\s": r"[\s\x{FEFF}&&[^\x{85}]]", r"\S": r"[^\s\x{FEFF}]"}  # in a class and outside
_LINE_ENDS = r"[^\n\r\x{2028}\x{2029}]"


def tightened(schema: Any, name: str) -> Any:
    """The same schema for llguidance.

    Args:
        schema: of any draft; what stands behind unknown words is taken for a schema, as references may point there.
        name: in messages.

    Raises:
        UserError: what cannot be kept, by its keyword.
    """
    if isinstance(schema, list):
        return [tightened(part, name) for part in schema]
    if not isinstance(schema, dict):
        return schema
    for word in UNKEPT:
        if word in schema:
            raise UserError(f"{name}: {word} cannot be kept")
    for word in BOUNDS:
        if isinstance(bound := schema.get(word), int | float) and not -LARGEST <= bound <= LARGEST:
            raise UserError(f"{name}: {word} cannot be kept, expected a number from -2^53 to 2^53")
    spelt = [schema.get(word) for word in ("const", "enum", "required")]
    spelt += named if isinstance(named := schema.get("properties"), dict) else ()
    if _UNSPELT.search(json.dumps(spelt, ensure_ascii=False)):
        raise UserError(f"{name}: control characters in const, enum or the name of a property cannot be kept")
    found: dict[str, Any] = {}
    for word, value in schema.items():
        if word == "patternProperties" and isinstance(value, dict):
            value = {javascript(pattern): part for pattern, part in value.items()}
        if word in BY_NAME and isinstance(value, dict):
            value = {key: tightened(part, name) for key, part in value.items()}
        elif word == "pattern" and isinstance(value, str):
            value = javascript(value)
        elif word not in DATA:
            value = tightened(value, name)
        found[word] = value
    more, others = FORMATS.get(str(schema.get("format"))), found.get("allOf", [])
    if more is not None and isinstance(others, list):
        found["allOf"] = [*others, more]
    _check_min_properties(schema, name)
    return found


def javascript(pattern: str) -> str:
    """An expression of ECMA 262 as one of Rust's, where the two differ in what they match."""

    def one(match: re.Match[str]) -> str:
        token, body = match[0], match["body"]
        if body is None:
            return _LINE_ENDS if token == "." else _JAVASCRIPT.get(token, token)
        if not body:  # to Rust the bracket would be a letter
            return r"[\s\S]" if match["no"] else r"[^\s\S]"
        return f"[{match['no']}{_RANGE.sub(_in_class, body)}]"

    return _TOKEN.sub(one, pattern)


def _in_class(match: re.Match[str]) -> str:
    """Rust has classes in classes, and operators between them."""
    first, last, single = (
        "\\" + token if token in ("[", "&", "~", "-") else token and _JAVASCRIPT.get(token, token)
        for token in match.groups()
    )
    return single or f"{first}-{last}"


def _check_min_properties(schema: dict[str, Any], name: str) -> None:
    """Properties without a name of their own may come twice, and then are one."""
    least, required = schema.get("minProperties"), schema.get("required", [])
    named = schema.get("additionalProperties") is False and "patternProperties" not in schema
    if isinstance(least, int | float) and isinstance(required, list) and not named and least > len(required) + 1:
        raise UserError(f"{name}: minProperties above 1 cannot be kept, expected properties that are required instead")


def check_multiples(schema: Any, name: str) -> None:
    """Refuses steps of numbers that have too many remainders together, wherever they stand in a document.

    llguidance follows every remainder: most of a second for 100,000 of them, and soon all memory.
    """
    found = list(_steps(schema))
    if not all(map(math.isfinite, found)):
        raise UserError(f"{name}: multipleOf cannot be kept, expected a finite number")
    steps = [Fraction(str(step)) for step in found if 0 < step <= LARGEST]
    if not steps:
        return
    whole, parts = math.lcm(*(step.numerator for step in steps)), math.gcd(*(step.denominator for step in steps))
    _, digits, zeros = (decimal.Decimal(whole) / parts).normalize().as_tuple()
    first = int("".join(map(str, digits)))
    if first > 99 and first * 10 ** max(0, int(zeros)) > 100_000:
        raise UserError(
            f"{name}: multipleOf cannot be kept, expected a least common multiple of at most 100,000 in the last"
            " decimal place, or of two digits and zeros"
        )


def _steps(schema: Any) -> Iterator[float]:
    if isinstance(schema, list):
        for part in schema:
            yield from _steps(part)
    elif isinstance(schema, dict):
        for word, value in schema.items():
            if word == "multipleOf" and type(value) in (int, float):
                yield value
            elif word in BY_NAME and isinstance(value, dict):
                yield from _steps(list(value.values()))
            elif word not in DATA:
                yield from _steps(value)
