"""The files of recorded sessions: where they lie, what is in them, and how they go.

Knows nothing of who writes them.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.openblas import cache_dir


def folder() -> pathlib.Path:
    """The folder of all sessions."""
    return cache_dir() / "sessions"


def files() -> list[pathlib.Path]:
    """The files of all sessions, oldest first; each is what one process recorded."""
    return sorted(folder().glob("*.jsonl"))


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of a file. A line that is none, as one that was cut short, is left out.

    Raises:
        UserError: a file that cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and _is_record(record):
            found.append(record)
    return found


def _is_record(fields: dict[str, Any]) -> bool:
    messages = fields.get("messages", [])
    return (
        isinstance(fields.get("target", {}), dict)
        and isinstance(fields.get("time", 0), int | float)
        and isinstance(messages, list)
        and all(isinstance(message, dict) for message in messages)
    )


def delete() -> int:
    """Removes all files; how many they were. Raises UserError for one that cannot be removed."""
    found = files()
    for path in found:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be removed ({error.strerror})") from error
    return len(found)
