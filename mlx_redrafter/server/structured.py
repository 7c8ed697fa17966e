"""What the answer to a request has to be, from the fields of its body. Knows nothing of tokens and HTTP."""

from __future__ import annotations

from typing import Any

from mlx_redrafter.constraints.constraint import Constraint, json_object, json_schema
from mlx_redrafter.constraints.tools import ToolCalls
from mlx_redrafter.errors import UserError


def constraint_of(body: dict[str, Any], schema: str) -> Constraint | None:
    """What `response_format` of a checked body asks for; None for any text.

    Args:
        schema: the field that a schema came in, in messages.

    Raises:
        UserError: a schema that is wrong, or cannot be kept.
    """
    form = body.get("response_format") or {"type": "text"}
    if form["type"] == "json_object":
        return json_object("response_format")
    if form["type"] == "json_schema":
        return json_schema(form["json_schema"]["schema"], schema)
    return None


def calls_of(body: dict[str, Any]) -> ToolCalls | None:
    """The calls that `tools` and `tool_choice` of a checked body ask for; None for any text.

    Raises:
        UserError: a schema that is wrong, or cannot be kept; a tool that is not there.
    """
    functions = {tool["function"]["name"]: tool["function"] for tool in body.get("tools", ())}
    choice = body.get("tool_choice", "auto")
    if isinstance(choice, dict):
        name = choice["function"]["name"]
        functions = {name: functions[name]} if name in functions else {}
    forced = choice not in ("auto", "none")
    if forced and not functions:
        raise UserError("tool_choice: the tool is not among tools")
    if choice == "none" or not (forced or any(function.get("strict") for function in functions.values())):
        return None
    if (body.get("response_format") or {"type": "text"})["type"] != "text":
        raise UserError("response_format: found with tools that are strict or required, expected one of the two")
    schemas: dict[str, Any] = {}
    for name, function in functions.items():
        schemas[name] = {"type": "object"} | ((function.get("strict") and function.get("parameters")) or {})
        json_schema(schemas[name], f"tools: {name}")
    return ToolCalls(schemas, forced)
