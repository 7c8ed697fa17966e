"""Keeps what was measured and learnt: one JSON file for each device and kind of pair.

Knows nothing of what is in it. A file that is damaged or of another version counts as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import read_json, write_json
from mlx_redrafter.system.openblas import cache_dir

VARIABLE = "MLX_REDRAFTER_TUNING"  # a directory to keep the files in, or "off" to keep none
VERSION = 2


def file_for(key: dict[str, Any]) -> pathlib.Path | None:
    """The file of a key; None where nothing is to be kept."""
    wish = os.environ.get(VARIABLE, "")
    if wish == "off":
        return None
    folder = pathlib.Path(wish).expanduser() if wish else cache_dir() / "tuning"
    return folder / f"{digest(json.dumps(key, sort_keys=True).encode())}.json"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def read(key: dict[str, Any]) -> dict[str, Any]:
    """The fields that were kept under a key; none if they cannot be used."""
    if (file := file_for(key)) is None:
        return {}
    try:
        fields = read_json(file)
    except (UserError, OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) and (fields.get("version"), fields.get("key")) == (VERSION, key) else {}


def write(key: dict[str, Any], fields: dict[str, Any]) -> pathlib.Path | None:
    """Keeps fields, whole or not at all; a place that cannot be written is no reason to stop, and gives None."""
    if (file := file_for(key)) is None:
        return None
    try:
        write_json(file, {"version": VERSION, "key": key, **fields}, indent=1)
    except (UserError, OSError):
        return None
    return file
