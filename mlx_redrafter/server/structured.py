"""What the answer to a request has to be, from the fields of its body. Knows nothing of tokens and HTTP."""

from __future__ import annotations

from typing import Any

from mlx_redrafter.constraints.constraint import Constraint, json_object, json_schema


def constraint_of(body: dict[str, Any]) -> Constraint | None:
    """What `response_format` of a checked body asks for; None for any text.

    Raises:
        UserError: a schema that is wrong, or cannot be kept.
    """
    form = body.get("response_format") or {"type": "text"}
    if form["type"] == "json_object":
        return json_object("response_format")
    if form["type"] == "json_schema":
        return json_schema(form["json_schema"]["schema"], "response_format.json_schema.schema")
    return None
