"""Finds the documents of files, folders and data sets of the Hub, and indexes them by byte.

Each file is read once at the start: hashed, checked record by record, and indexed. So a mistake
in the last line is found before any work is done. Later one document is read at a time.
Knows nothing of tokens.
"""

from __future__ import annotations

import array
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Collection, Sequence
from typing import Any, NoReturn

import numpy as np

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.hub import fetch
from mlx_redrafter.training.text import records
from mlx_redrafter.training.text.formats import Document, document
from mlx_redrafter.training.text.records import KINDS, LINES, SOURCE_SUFFIXES, TEXT, bare_suffix

SKIPPED_FOLDERS = frozenset(("__pycache__", "node_modules", "site-packages", "dist-packages"))
DATASET_SUFFIXES = (*KINDS, ".txt")
DATASET_FACTS = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"))
PIECE = 1 << 16  # bytes; a longer text is read as pieces of at most this, cut at line ends


class Documents:
    """All documents of some files, folders, or data sets of the Hub.

    A folder that holds a data file is a data set of its data files (JSON lines, else tables or
    arrays of records of a form that is read); any other is a tree of text and source files.
    Text files of more than 64 kB are several documents. What cannot be found again by byte
    (tables, arrays, gzipped files) is unpacked into a temporary file.

    Args:
        names: paths, or Hub ids "owner/name".
        flag: what the user typed them for, for messages.

    Attributes:
        files: path, sha256 and bytes of each file, in order.
        sizes: (N,) int64, bytes of each document.
        roles: (N,) bool, whether it is a conversation, or a prompt and its completion.

    Raises:
        UserError: naming the file and line: nothing there, not UTF-8, broken JSON, missing fields.
    """

    def __init__(self, names: Sequence[str], flag: str):
        self.files: list[dict[str, Any]] = []
        self._kinds: list[str] = []
        self._paths: list[pathlib.Path | None] = []  # None for what was unpacked
        self._unpacked = tempfile.TemporaryFile()  # noqa: SIM115 - goes with the object
        # Of each document: file, first byte, the byte after its last, number, and whether roles are known.
        places = array.array("q")
        for name in names:
            try:
                found = _find(name, flag)
            except OSError as error:
                raise UserError(f"{flag} {name}: cannot be read ({error.strerror})") from error
            for path, label in found:
                self._index(path, label, path == pathlib.Path(name).expanduser(), places)
        self._places = np.array(places, np.int64).reshape(-1, 5)
        if not len(self._places):
            raise UserError(f"{flag} {' '.join(names)}: empty, no text found")
        self.sizes = self._places[:, 2] - self._places[:, 1]
        self.roles = self._places[:, 4].astype(bool)
        owners = self._places[:, 0]
        self._is_first = np.diff(owners, prepend=-1) != 0
        self._is_last = np.diff(owners, append=-1) != 0

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Document:
        """Reads one document. Raises UserError where its file cannot be read any more."""
        file, first, end, place, _ = self._places[number].tolist()
        path, label, kind = self._paths[file], self.files[file]["path"], self._kinds[file]
        if path is None:
            self._unpacked.seek(first)
            data = self._unpacked.read(end - first)
        else:
            try:
                with path.open("rb") as handle:
                    handle.seek(first)
                    data = handle.read(end - first)
            except OSError as error:
                raise UserError(f"{label}: cannot be read ({error.strerror})") from error
        where = f"{label} {LINES if kind == TEXT else kind} {place}"
        if kind != TEXT:
            return next(document(record, where) for *_, record in records.json_lines([data], label))
        is_start, is_end = bool(self._is_first[number]), bool(self._is_last[number])
        return Document(where, records.decode(data, label), is_start=is_start, is_end=is_end)

    def _index(self, path: pathlib.Path, label: str, named: bool, places: array.array) -> None:
        number, found = len(self._paths), array.array("q")
        try:
            kind = records.kind_of(path, label)
            text = records.read_text(path, label) if kind == TEXT else ""
        except records.NotText:
            if named or bare_suffix(path) not in SOURCE_SUFFIXES:
                raise
            return  # trees hold odd files
        with records.reading(path, label) as file:
            unpacked = isinstance(file, gzip.GzipFile) or kind not in (LINES, TEXT)
            if kind == TEXT:
                data = text.encode()
                start, line = self._unpack(data) if unpacked else 0, 1
                for first, end in _pieces(data) if text.strip() else ():
                    found.extend((number, start + first, start + end, line, False))
                    line += data.count(10, first, end)
            elif not unpacked:
                for line, first, end, record in records.json_lines(file, label):
                    found.extend((number, first, end, line, document(record, f"{label} line {line}").has_roles))
            else:
                for place, record in records.read_records(path, label):
                    data, roles = json.dumps(record).encode(), document(record, f"{label} {kind} {place}").has_roles
                    first = self._unpack(data)
                    found.extend((number, first, first + len(data), place, roles))
        places.extend(found)
        self._kinds.append(kind)
        self._paths.append(None if unpacked else path)
        self.files.append({"path": label, "sha256": _sha256(path), "bytes": path.stat().st_size})

    def _unpack(self, data: bytes) -> int:
        """Appends to the temporary file; returns where."""
        try:
            first = self._unpacked.seek(0, 2)
            self._unpacked.write(data)
        except OSError as error:
            raise UserError(f"{tempfile.gettempdir()}: cannot be written ({error.strerror})") from error
        return first


def _sha256(path: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _pieces(data: bytes) -> list[tuple[int, int]]:
    """Where to cut a text so that no piece is longer than PIECE: after a line, or else between characters."""
    pieces, first = [], 0
    while len(data) - first > PIECE:
        end = data.rfind(b"\n", first, first + PIECE) + 1
        if end == 0:
            end = first + PIECE
            while data[end] & 0xC0 == 0x80:  # within a character
                end -= 1
        pieces.append((first, end))
        first = end
    return [*pieces, (first, len(data))]


def _find(name: str, flag: str) -> list[tuple[pathlib.Path, str]]:
    """The files that a name stands for, each with its name for people, in an order that is the same everywhere."""
    root = pathlib.Path(name).expanduser()
    if root.is_file():
        return [(root, name)]
    if root.is_dir():
        paths = _data_files(root) or sorted(text_files(root))
        if not paths:
            raise UserError(f"{flag} {name}: empty, no .jsonl file and no text or source file below it")
    elif re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        patterns = [f"*{suffix}{zipped}" for suffix in DATASET_SUFFIXES for zipped in ("", ".gz")]
        root = fetch(name, flag, patterns, repo_type="dataset")
        paths = sorted(p for p in root.rglob("*") if bare_suffix(p) in DATASET_SUFFIXES and p.name not in DATASET_FACTS)
        if not paths:
            raise UserError(
                f"{flag} {name}: the data set has no .jsonl, .json, .csv or .txt file (parquet is not read)"
            )
    else:
        raise UserError(f"{flag} {name}: no such file or directory (a Hub id looks like owner/name)")
    return [(path, f"{name.rstrip('/')}/{path.relative_to(root).as_posix()}") for path in paths]


def _data_files(root: pathlib.Path) -> list[pathlib.Path]:
    """The data files in a folder or in data/ below it, by the first kind of which there is one."""
    files = [p for folder in (root, root / "data") if folder.is_dir() for p in sorted(folder.iterdir()) if p.is_file()]
    lines = [p for p in files if KINDS.get(bare_suffix(p)) == LINES]
    others = [p for p in files if bare_suffix(p) in KINDS and p.name not in DATASET_FACTS and _is_data(p)]
    return (
        lines or others or [p for p in files if p.suffix.lower() in (".parquet", ".arrow")]
    )  # to be named as not read


def _is_data(path: pathlib.Path) -> bool:
    """Whether the first record of a table or array is a document; source trees hold others."""
    try:
        return any(document(record, "") for _, record in itertools.islice(records.read_records(path, path.name), 1))
    except UserError:
        return False


def _raise(error: OSError) -> NoReturn:
    raise error


def text_files(root: pathlib.Path, also: Collection[str] = ()) -> list[pathlib.Path]:
    """The text and source files below a folder; caches, packages and hidden folders are left out.

    Args:
        also: further suffixes, without a .gz behind them.
    """
    found, suffixes = [], SOURCE_SUFFIXES.union(also)
    for folder, below, files in os.walk(root, onerror=_raise):
        below[:] = [b for b in below if b not in SKIPPED_FOLDERS and not b.startswith(".")]
        paths = [pathlib.Path(folder, file) for file in files]
        found += [path for path in paths if path.suffix.lower() in suffixes or bare_suffix(path) in also]
    return found
