"""Finds what of a JSON schema only endless JSON would fulfil. Knows nothing of grammars."""

from __future__ import annotations

import re
import urllib.parse
from collections import defaultdict
from typing import Any


def endless(schema: dict[str, Any]) -> str:
    """The first reference that a document needs and that has no finite end; empty where there is none.

    The least fixpoint: a reference ends if its schema does, given that others end. Every reference is looked at
    again only when one that it mentions has turned out to end.
    """
    users, todo, ends = defaultdict[str, set[str]](set), ["#"], set[str]()
    schemas: dict[str, Any] = {}
    while todo:  # every reference that can be reached
        name = todo.pop()
        if name not in schemas:
            schemas[name] = _at(schema, name)
            for other in sorted(_references(schemas[name]), reverse=True):
                users[other].add(name)
                todo.append(other)
    todo = list(schemas)
    while todo:
        name = todo.pop()
        if name not in ends and _ends(schemas[name], ends):
            ends.add(name)
            todo += users[name]
    if "#" in ends:
        return ""
    return next((name for name in schemas if name != "#" and name not in ends), "#")


def _ends(schema: Any, known: set[str]) -> bool:
    if not isinstance(schema, dict):
        return True
    if "$ref" in schema and schema["$ref"] not in known:
        return False
    if not all(_ends(part, known) for part in schema.get("allOf", ())):
        return False
    for choice in ("anyOf", "oneOf"):
        if choice in schema and not any(_ends(part, known) for part in schema[choice]):
            return False
    if "const" in schema or "enum" in schema:
        return True
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if any(kind not in ("object", "array") for kind in kinds):
        return True
    required = [_property(schema, name) for name in schema.get("required", ())]
    least = schema.get("minItems", 0)
    first = list(schema.get("prefixItems", ()))[:least]
    parts = [*first, *([schema.get("items", True)] if least > len(first) else [])]
    ways = {"object": required, "array": parts}
    needed = [ways[kind] for kind in kinds] or ([required] if required else [parts])
    return any(all(_ends(part, known) for part in way) for way in needed)


def _property(schema: dict[str, Any], name: str) -> Any:
    """What a property of this name has to be, as far as one keyword says it."""
    if name in schema.get("properties", {}):
        return schema["properties"][name]
    for pattern, found in schema.get("patternProperties", {}).items():
        try:
            if re.search(pattern, name):
                return found
        except re.error:  # an expression of JavaScript alone
            return True
    return schema.get("additionalProperties", True)


def _references(schema: Any) -> set[str]:
    """All references in a schema, wherever they stand; one in a text that is no schema does no harm."""
    if isinstance(schema, list):
        return set().union(*map(_references, schema))
    if not isinstance(schema, dict):
        return set()
    mine = {schema["$ref"]} if isinstance(schema.get("$ref"), str) else set()
    return mine.union(*map(_references, schema.values()))


def _at(schema: Any, name: str) -> Any:
    """What a reference points to; of one that is no pointer into the schema nothing is known."""
    base = schema.get("$id") if isinstance(schema, dict) else None
    name = urllib.parse.unquote(name.removeprefix(base) if isinstance(base, str) else name) or "#"
    path = name.removeprefix("#").split("/")[1:]
    if not name.startswith("#") or (name != "#" and not path):
        return True
    for part in path:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, dict):
            schema = schema.get(key, True)
        elif isinstance(schema, list) and key.isdigit() and int(key) < len(schema):
            schema = schema[int(key)]
        else:
            return True
    return schema
