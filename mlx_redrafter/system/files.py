"""Reads and writes files so that a mistake is one line and a crash leaves nothing half-written.

Knows nothing of what models keep in them.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from mlx_redrafter.errors import UserError, one_line

_POINTER = b"version https://git-lfs.github.com/spec/"


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Parses a JSON object. Raises UserError where it is missing, not readable or not one."""
    check_readable(path)
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value


def read_text(path: pathlib.Path) -> str:
    """A file's text. Raises UserError where it is missing, not readable or not UTF-8."""
    check_readable(path)
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as text ({one_line(error)})") from error


def write_json(path: pathlib.Path, value: Any, indent: int | None = 2) -> None:
    """Writes a JSON file, whole or not at all. Raises UserError where it cannot be written."""
    with replace_file(path) as file:
        file.write_text(json.dumps(value, indent=indent) + "\n", "utf-8")


def check_readable(path: pathlib.Path) -> None:
    """Raises UserError where a file is missing, may not be read, or only stands for what should be there."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: {_reason(error)}") from error
    if start.startswith(_POINTER):
        raise UserError(
            f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its directory,"
            " or download the repository with `hf download`"
        )
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{path}: is a web page, not the file itself; download the file with `hf download`")


def read_safetensors(path: pathlib.Path) -> dict[str, mx.array]:
    """All tensors of a safetensors file, memory-mapped lazily.

    The header is checked against the file's length first: reading a truncated file would
    otherwise fail late and far away, when the array is first used.

    Raises:
        UserError: a missing, truncated or foreign file.
    """
    check_safetensors(path)
    try:
        weights = mx.load(str(path))
    except RuntimeError as error:
        raise UserError(f"{path}: not readable as safetensors ({one_line(error)})") from error
    assert isinstance(weights, dict)
    return weights


def check_safetensors(path: pathlib.Path) -> list[str]:
    """The names of a file's tensors. Raises UserError unless its header is whole and all tensors lie inside it."""
    check_readable(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path}: truncated or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(file.read(length))
            ends = {name: int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a safetensors file (unreadable header)") from error
    end = 8 + length + max(ends.values(), default=0)
    if end > size:
        raise UserError(f"{path}: truncated, {size} bytes found, {end} expected")
    return list(ends)


@contextlib.contextmanager
def write_directory(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder beside `path` that takes its name when the block ends well.

    If the block raises, nothing of it stays.

    Raises:
        UserError: the place cannot be written, or something is there already.
    """
    target = pathlib.Path(path)
    require_free(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    try:
        folder.chmod(0o755)
        yield folder
        os.replace(folder, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_free(path: str | pathlib.Path) -> None:
    """Raises UserError unless `path` is free to become a new directory (absent, or empty)."""
    target = pathlib.Path(path)
    try:
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as error:
        raise UserError(f"{target}: {_reason(error)}") from error
    if taken:
        raise UserError(f"{target}: already exists; name a new directory or remove it first")


@contextlib.contextmanager
def replace_file(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary file name beside `path` (same suffix) that replaces it when the block ends well."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    except RuntimeError as error:  # mlx's savers have no OSError
        if not str(error).startswith(("[write]", "[save")):
            raise
        raise UserError(f"{path}: cannot be written ({one_line(error)})") from error
    finally:
        with contextlib.suppress(OSError):  # or its message would take the place of the one above
            temporary.unlink(missing_ok=True)


def remove_left_over(folder: pathlib.Path) -> None:
    """Removes what `replace_file` left in a folder when its process was killed. No other one may be writing there."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\.\d+\..+", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def _reason(error: OSError) -> str:
    """Why a file cannot be read, for people."""
    known = {FileNotFoundError: "no such file", IsADirectoryError: "not a file"}
    known[PermissionError] = "may not be read (permission denied)"
    return known.get(type(error), error.strerror or str(error))
