"""The documents of files, folders and data sets of the Hub, indexed by byte.

Files are looked through once: hashed, checked line by line, and indexed, so that a mistake
in the last line is found before any work is done; later one document is read at a time.
"""

from __future__ import annotations

import array
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.hub import fetch
from mlx_redrafter.training.text.formats import Document, decode, document, json_lines, parse_array, read_bytes

_SUFFIXES = (
    "txt md rst tex html css py pyi js jsx ts tsx c h cc cpp hpp cu m mm metal swift rs go java kt scala cs rb php pl"
    " lua sh sql r jl hs ml ex erl clj zig toml yaml yml"
)
SOURCE_SUFFIXES = frozenset("." + suffix for suffix in _SUFFIXES.split())
SKIPPED_FOLDERS = frozenset(("__pycache__", "node_modules", "site-packages", "dist-packages"))
DATASET_SUFFIXES = (".jsonl", ".json", ".txt")
DATASET_FACTS = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"))
PIECE = 1 << 16  # bytes; a longer text is read as pieces of at most this, cut at line ends


class Documents:
    """All documents of some files, folders, or data sets of the Hub.

    A folder with .jsonl files is a data set of these; any other is a tree of text and source
    files. Text files of more than 64 kB are several documents.

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
        self._paths: list[pathlib.Path] = []
        # Of each document: file, first byte, the byte after its last, line, and whether roles are known;
        # in an array of a .json file: file, item, item plus its size, item from 1, roles.
        places = array.array("q")
        for name in names:
            for path, label in _find(name, flag):
                self._index(path, label, path == pathlib.Path(name).expanduser(), places)
        self._places = np.array(places, np.int64).reshape(-1, 5)
        if not len(self._places):
            raise UserError(f"{flag} {' '.join(names)}: empty, no text found")
        self.sizes = self._places[:, 2] - self._places[:, 1]
        self.roles = self._places[:, 4].astype(bool)
        self._array = functools.lru_cache(1)(self._array_of)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Document:
        """Reads one document. Raises UserError where its file cannot be read any more."""
        file, first, end, line, _ = (int(place) for place in self._places[number])
        path, facts = self._paths[file], self.files[file]
        if path.suffix == ".json":
            return document(self._array(file)[first], f"{facts['path']} item {line}")
        try:
            with path.open("rb") as handle:
                handle.seek(first)
                data = handle.read(end - first)
        except OSError as error:
            raise UserError(f"{facts['path']}: cannot be read ({error.strerror})") from error
        where = f"{facts['path']} line {line}"
        if path.suffix == ".jsonl":
            return next(document(record, where) for *_, record in json_lines([data], facts["path"]))
        text = decode(data, facts["path"])
        return Document(where, text=text, is_start=first == 0, is_end=end == facts["bytes"])

    def _array_of(self, file: int) -> list[Any]:
        return parse_array(read_bytes(self._paths[file], self.files[file]["path"]), self.files[file]["path"])

    def _index(self, path: pathlib.Path, label: str, named: bool, places: array.array) -> None:
        number, found = len(self._paths), array.array("q")
        if path.suffix == ".jsonl":
            try:
                with path.open("rb") as lines:
                    for line, first, end, record in json_lines(lines, label):
                        roles = document(record, f"{label} line {line}").has_roles
                        found.extend((number, first, end, line, roles))
            except OSError as error:
                raise UserError(f"{label}: cannot be read ({error.strerror})") from error
        elif path.suffix == ".json":
            for item, record in enumerate(parse_array(read_bytes(path, label), label)):
                roles = document(record, f"{label} item {item + 1}").has_roles
                found.extend((number, item, item + len(json.dumps(record)), item + 1, roles))
        else:
            data = read_bytes(path, label)
            try:
                text = decode(data, label)
            except UserError:
                if named:
                    raise
                return  # trees hold odd files
            line = 1
            for first, end in _pieces(data) if text.strip() else ():
                found.extend((number, first, end, line, False))
                line += data.count(10, first, end)
        places.extend(found)
        self._paths.append(path)
        self.files.append({"path": label, "sha256": _sha256(path), "bytes": path.stat().st_size})


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
        paths = sorted(root.glob("*.jsonl")) + sorted(root.glob("data/*.jsonl"))
        paths = paths or sorted(_tree(root))
        if not paths:
            raise UserError(f"{flag} {name}: empty, no .jsonl file and no text or source file below it")
    elif re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        root = fetch(name, flag, [f"*{suffix}" for suffix in DATASET_SUFFIXES], repo_type="dataset")
        paths = sorted(p for p in root.rglob("*") if p.suffix in DATASET_SUFFIXES and p.name not in DATASET_FACTS)
        if not paths:
            raise UserError(f"{flag} {name}: the data set has no .jsonl, .json or .txt file (parquet is not read)")
    else:
        raise UserError(f"{flag} {name}: no such file or directory (a Hub id looks like owner/name)")
    return [(path, f"{name.rstrip('/')}/{path.relative_to(root).as_posix()}") for path in paths]


def _tree(root: pathlib.Path) -> list[pathlib.Path]:
    found = []
    for folder, below, files in os.walk(root):
        below[:] = [b for b in below if b not in SKIPPED_FOLDERS and not b.startswith(".")]
        found += [pathlib.Path(folder, f) for f in files if pathlib.Path(f).suffix.lower() in SOURCE_SUFFIXES]
    return found
