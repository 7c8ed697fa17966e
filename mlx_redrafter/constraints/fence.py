"""Keeps what would end a call out of the JSON in it: its texts and names, at any depth. Knows nothing of tools.

Who reads a call looks for a tag in its text, and does not see that it stands in a JSON string.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

from mlx_redrafter.constraints.strictness import BY_NAME, DATA

OPEN = ("items", "additionalItems", "additionalProperties")  # that may be true
ELSEWHERE = {"$ref", "anyOf", "oneOf", "allOf", "enum", "const"}  # what these allow is fenced where it stands


def fenced(schema: dict[str, Any], stops: Collection[str]) -> dict[str, Any]:
    """A schema of what the given one allows, without the JSON that holds one of the stops.

    Args:
        schema: a whole document, in which no stop stands itself, without patternProperties.
        stops: all begin with the same character, which none of them has twice.
    """
    if not stops:
        return schema
    definitions, name = schema.get("$defs", {}), "fenced"
    while name in definitions:
        name += "_"
    text, anything = free_of(stops), {"$ref": f"#/$defs/{name}"}

    def inside(part: Any) -> Any:
        if part is True or part == {}:
            return anything
        return walls(part) if isinstance(part, dict) else part

    def walls(part: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for word, value in part.items():
            if word in BY_NAME and isinstance(value, dict):
                value = {key: inside(one) for key, one in value.items()}
            elif isinstance(value, list) and word not in DATA:
                value = [inside(one) for one in value]
            elif word in OPEN or (isinstance(value, dict) and word not in (*DATA, "x-guidance")):
                value = inside(value)
            found[word] = value
        if ELSEWHERE & part.keys():
            return found
        kinds, more = part.get("type", ["string", "array", "object"]), list[dict[str, Any]]()
        if "string" in kinds:
            more.append({"pattern": text})
        if "array" in kinds:
            found.setdefault("additionalItems" if isinstance(found.get("items"), list) else "items", anything)
        if "object" in kinds and found.setdefault("additionalProperties", anything):
            more.append({"patternProperties": {text: {}}, "additionalProperties": False})
        return found | ({"allOf": more} if more else {})

    known = {"type": ["string", "number", "boolean", "null", "array", "object"]}
    found = walls(schema if schema.keys() - {"$defs", "definitions"} else schema | known)
    return found | {"$defs": found.get("$defs", {}) | {name: walls(known)}}


def free_of(stops: Collection[str]) -> str:
    """The expression of all texts that hold none of the stops."""
    first = _spelt(next(iter(stops))[0])

    def goes_on(rests: list[str]) -> str:
        """What may stand up to the next first character, where a stop may have begun."""
        heads = defaultdict[str, list[str]](list)
        for rest in rests:
            heads[rest[0]].append(rest[1:])
        ways = [f"[^{first}{''.join(map(_spelt, heads))}][^{first}]*"]
        ways += [_spelt(head) + goes_on(more) for head, more in heads.items() if "" not in more]
        return f"(?:{'|'.join(ways)})?"

    return f"^[^{first}]*(?:{first}{goes_on([stop[1:] for stop in stops])})*$"


def _spelt(character: str) -> str:
    return character if character.isalnum() or character in "<>/_:!" else "\\" + character
