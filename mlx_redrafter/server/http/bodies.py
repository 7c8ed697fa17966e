"""Reads the body of a request, and checks it against the description that clients get. Knows nothing of models."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from mlx_redrafter.errors import one_line
from mlx_redrafter.server.answers import Answer

FILE = pathlib.Path(__file__).with_name("openapi.json")


@functools.cache
def description() -> dict[str, Any]:
    """The OpenAPI description of the server."""
    return json.loads(FILE.read_text("utf-8"))


@functools.cache
def _validator(path: str) -> Draft202012Validator:
    content = description()["paths"][path]["post"]["requestBody"]["content"]
    return Draft202012Validator(description() | content["application/json"]["schema"])


def read(raw: bytes, path: str) -> dict[str, Any]:
    """The fields of a body that was posted to a path; those that are null count as left out.

    Raises:
        Answer: 400, with the field and what is wrong with it.
    """
    try:
        body = json.loads(raw.decode("utf-8"), parse_float=_number, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Answer(400, f"the body is not JSON ({one_line(error)})") from None
    return check(body, path)


def check(body: Any, path: str) -> dict[str, Any]:
    """The same from what the JSON stood for."""
    try:
        wrong = best_match(_validator(path).iter_errors(body))
    except RecursionError:
        raise Answer(400, "the body is nested too deeply") from None
    if wrong is not None:
        field = ".".join(map(str, wrong.absolute_path)) or "the body"
        raise Answer(400, f"{field}: {one_line(wrong.message)}")
    return {name: value for name, value in body.items() if value is not None}


def _number(text: str) -> float:
    """A number as Python has it; 2.0 is a whole one, for the description as for JSON."""
    number = float(text)
    return int(number) if number.is_integer() else number


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")
