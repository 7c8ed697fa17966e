"""Writes a schema of text as an expression for places where text has no quotes. Knows nothing of tools."""

from __future__ import annotations

import json
import re
from typing import Any

from mlx_redrafter.constraints.strictness import javascript
from mlx_redrafter.errors import UserError

WORDS = {"type", "enum", "const", "minLength", "maxLength", "pattern", "title", "description", "default", "examples",
    "$comment", "$defs", "definitions"}  # fmt: skip
_WHOLE = re.compile(r"\^((?:[^\\^$|]|\\.)*)\$", re.DOTALL)  # anchors at both ends, and no others
_NULLS = ("null", "none", "nil")  # parsers read these as no value
_STRIPPED = r"/(?s:\S(.*\S)?)?/ & ~/[\x00-\x1f](?s:.*)|(?s:.*)[\x00-\x1f]/"
_NO_JSON = r"~/\s*[\[{](?s:.*)/"


def raw_text(
    schema: dict[str, Any],
    without: tuple[str, ...],
    where: str,
    parser: str,
    stripped: bool,
    guessed: bool = False,
) -> str:
    """A terminal in Lark's form.

    Args:
        schema: of a string.
        without: what the text must not hold, as the parser would take it for its end.
        where, parser: in messages.
        stripped: the parser strips it, so that space at its ends would be lost.
        guessed: it takes what it can for an object or an array.

    Raises:
        UserError: what cannot be kept in text of this form.
    """

    def refuse(what: str) -> UserError:
        return UserError(f"{where}: {what} of text cannot be kept with the tool parser {parser}")

    if word := next((word for word in schema if word not in WORDS and not word.startswith("x-")), None):
        raise refuse(word)
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is not None:
        if "pattern" in schema or {"enum", "const"} <= schema.keys():
            raise refuse("more than a choice of values")
        texts = [value for value in values if isinstance(value, str) and len(value) >= least]
        texts = [text for text in texts if most == "" or len(text) <= most]
        for text in texts:
            lost = (stripped and text != text.strip()) or (guessed and text.lstrip()[:1] in ("[", "{"))
            if any(end in text for end in without) or lost or text.lower() in _NULLS:
                raise refuse(f"the value {json.dumps(text)[:40]}")
        if not texts:
            raise refuse("a choice of no value")
        return " | ".join(map(json.dumps, texts))
    found = [f"/(?s:.{{{least},{most}}})/"]
    if pattern := schema.get("pattern"):
        whole = _WHOLE.fullmatch(pattern)
        if whole is None or "/" in pattern:
            raise refuse(f"the pattern {json.dumps(pattern)[:40]}")
        found.append(f"/{javascript(whole[1])}/")
    found += [f"~(/(?s:.*)/ {json.dumps(end)} /(?s:.*)/)" for end in without]
    found += [f"~/(?i:{'|'.join(_NULLS)})/", *([_STRIPPED] if stripped else []), *([_NO_JSON] if guessed else [])]
    return " & ".join(found)
