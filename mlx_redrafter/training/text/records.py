"""Reads the records of a data file: JSON lines, a JSON array, a CSV table or plain text, gzipped or not.

The file's name decides, or its content where the name does not. Knows nothing of what a record means.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

from mlx_redrafter.errors import UserError, one_line

_TEXT = (
    "txt md rst tex html css py pyi js jsx ts tsx c h cc cpp hpp cu m mm metal swift rs go java kt scala cs rb php pl"
    " lua sh sql r jl hs ml ex erl clj zig toml yaml yml"
)
SOURCE_SUFFIXES = frozenset("." + suffix for suffix in _TEXT.split())
LINES, ARRAY, TABLE, TEXT = "line", "item", "row", "text"  # all but the last are the word for a record's place
KINDS = {".jsonl": LINES, ".ndjson": LINES, ".json": ARRAY, ".csv": TABLE, ".tsv": TABLE}
PAIRS = (("prompt", "completion"), ("instruction", "output"))  # fields with a prompt, and the text after it
_FOREIGN = {
    b"PAR1": "is Parquet, which is not read; convert it to JSON lines",
    b"ARROW1": "is Arrow, which is not read; convert it to JSON lines",
    b"PK\x03\x04": "is a zip archive, which is not read; unpack it",
    b"\xfd7zXZ\0": "is compressed by xz, which is not read; unpack it",
    b"(\xb5/\xfd": "is compressed by zstd, which is not read; unpack it",
    b"BZh91AY&SY": "is compressed by bzip2, which is not read; unpack it",
    b"%PDF-": "is a PDF, which is not read; expected text",
    b"version https://git-lfs.github.com/spec/": "is a Git LFS pointer; fetch the file itself (git lfs pull)",
    b"\xff\xfe": "is UTF-16, expected UTF-8",
    b"\xfe\xff": "is UTF-16, expected UTF-8",
}
_GZIP = b"\x1f\x8b"
_BOM = b"\xef\xbb\xbf"
_HEAD = 1 << 16  # bytes that tell what a file holds


class NotText(UserError):
    """A file that is not text in UTF-8."""


def bare_suffix(path: pathlib.Path) -> str:
    """What a name says of the content: its last suffix in small letters, .gz left out."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return ([""] + [suffix for suffix in suffixes if suffix != ".gz"])[-1]


@contextlib.contextmanager
def reading(path: pathlib.Path, label: str) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked if they are gzipped. Raises UserError where they cannot be read."""
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == _GZIP
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw) if zipped else contextlib.nullcontext(raw) as file:
                yield file  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{label}: cannot be read ({reason})") from error


def read_text(path: pathlib.Path, label: str) -> str:
    """A whole file, unpacked, as text. Raises UserError where it cannot be read, and NotText."""
    with reading(path, label) as file:
        return decode(file.read(), label)


def kind_of(path: pathlib.Path, label: str) -> str:
    """What a file holds: LINES, ARRAY, TABLE or TEXT.

    Raises:
        UserError: it cannot be read, or is of a format that is not read, by the name of the format.
    """
    with reading(path, label) as file:
        head = file.read(_HEAD)
    for mark, what in _FOREIGN.items():
        if head.startswith(mark):
            raise NotText(f"{label}: {what}")
    suffix, head = bare_suffix(path), head.removeprefix(_BOM).lstrip()
    if suffix in SOURCE_SUFFIXES:
        return TEXT
    first, _, rest = head.partition(b"\n")
    if suffix in ("", ".json") or suffix not in KINDS:
        if _is_object(first) and (rest.strip() or suffix != ".json"):
            return LINES
        if head[:1] == b"[" and head[1:].lstrip()[:1] == b"{":
            return ARRAY
        columns = set(_columns(first.decode("utf-8", "replace"))[0])
        if suffix not in KINDS and any(columns.issuperset(pair) for pair in PAIRS):
            return TABLE
    return KINDS.get(suffix, TEXT)


def read_records(path: pathlib.Path, label: str) -> Iterator[tuple[int, Any]]:
    """The records of a file that is not TEXT, each with its number: line, item from 1, or row (the header is row 1).

    Raises UserError that names the place where it is not UTF-8, or broken JSON or CSV.
    """
    kind = kind_of(path, label)
    if kind == LINES:
        with reading(path, label) as file:
            yield from ((line, record) for line, _, _, record in json_lines(file, label))
        return
    text = read_text(path, label).removeprefix("\ufeff")
    if kind == ARRAY:
        yield from enumerate(_array(text, label), 1)
    else:
        yield from _table(text, label)


def json_lines(lines: Iterable[bytes], label: str) -> Iterator[tuple[int, int, int, Any]]:
    """The records of a .jsonl file: line (from 1), first byte and the byte after the last, and the parsed record.

    Raises UserError that names the line where it is not UTF-8, or broken JSON.
    """
    at = 0
    for line, raw in enumerate(lines, 1):
        where = f"{label} line {line}"
        data = raw.removeprefix(_BOM) if line == 1 else raw
        if data.strip():
            try:
                yield line, at, at + len(raw), json.loads(decode(data, where))
            except ValueError as error:
                raise UserError(f"{where}: not valid JSON ({one_line(error)})") from error
        at += len(raw)


def decode(data: bytes, where: str) -> str:
    """UTF-8 as text. Raises UserError naming the line of the first byte that is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = f" line {data.count(10, 0, error.start) + 1}" if " line " not in where else ""
        raise NotText(f"{where}{line}: not UTF-8 (byte 0x{data[error.start]:02x})") from error


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return len(line) == _HEAD and line[:2] == b'{"'  # a line that is longer than what we looked at


def _array(text: str, label: str) -> list[Any]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{label} line {error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(items, list):
        raise UserError(f"{label}: found a JSON {type(items).__name__}, expected an array of records")
    return items


def _columns(line: str) -> tuple[list[str], str]:
    """The names in a table's first line, and what separates them."""
    separator = max(",;\t", key=line.count)
    return [name.strip().lower() for name in next(csv.reader([line], delimiter=separator), [])], separator


def _table(text: str, label: str) -> Iterator[tuple[int, dict[str, str]]]:
    names, separator = _columns(text.partition("\n")[0])
    usual, row = csv.field_size_limit(len(text) + 1), 0  # a cell may be a book
    try:
        for row, found in enumerate(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True), 1):
            if row == 1 or not found:
                continue
            if len(found) != len(names):
                raise UserError(f"{label} row {row}: {len(found)} cells, expected {len(names)}, as in the first row")
            yield row, dict(zip(names, found, strict=True))
    except csv.Error as error:
        raise UserError(f"{label} row {row + 1}: not valid CSV ({error})") from error
    finally:
        csv.field_size_limit(usual)
