"""A GGUF file's metadata and tensors, the parts of a split file together.

The reading is our own because gguf's `GGUFReader` makes an array of every token and every merge (seconds
for a usual vocabulary) and tells a damaged file by whatever fails first, if at all. Types and sizes are gguf's.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import pathlib
import re
import struct
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from mlx_redrafter.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_MOST_DIMENSIONS = 4  # ggml's
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as the file holds it.

    Attributes:
        path: of the file that it is in.
        shape: row-major, as numpy's: (rows, columns) of a matrix.
        rows: (product of all but the last dimension, bytes of a row), uint8, mapped from the file.
    """

    path: pathlib.Path
    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    rows: np.ndarray


@dataclasses.dataclass(frozen=True)
class GGUF:
    """What a GGUF file says, all parts of a split one together.

    Attributes:
        path: the file, or the first part.
        parts: all files, in order.
        metadata: key -> number, bool, str or list of them; the first part's.
        tensors: by name.
    """

    path: pathlib.Path
    parts: list[pathlib.Path]
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of a key; `default` where it is not there, and None as default means that it has to be.

        Args:
            kind: int, float (which takes an int, too), bool, str or list.

        Raises:
            UserError: the key is missing, or its value is of another kind.
        """
        if key not in self.metadata:
            if default is None:
                raise UserError(f"{self.path}: key {key!r} is missing")
            return default
        value = self.metadata[key]
        if kind is not list and isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # one for each layer, all the same
        allowed: tuple[type, ...] = (int, float) if kind is float else (kind,)
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
            found = f"a list of {len(value)}" if isinstance(value, list) else repr(value)[:80]
            raise UserError(f"{self.path}: {key} is {found}, expected {kind.__name__}")
        return _shortest(value) if kind is float else value

    def tensor(self, name: str) -> Tensor:
        """A tensor by name. Raises UserError where there is none."""
        if name not in self.tensors:
            raise UserError(f"{self.path}: tensor {name!r} is missing")
        return self.tensors[name]


def read_gguf(path: pathlib.Path) -> GGUF:
    """Reads the header of a file, and those of the other parts where it is one of several.

    Raises:
        UserError: no such file, no GGUF file, one of another version or byte order, one that is cut
            short, or a part that is missing.
    """
    metadata, tensors = _read_part(path)
    if metadata.get("split.count", 0) in (0, 1):
        return GGUF(path, [path], metadata, tensors)
    parts = split_parts(path)
    if len(parts) != metadata["split.count"]:
        raise UserError(
            f"{path}: is one of {metadata['split.count']} parts, expected a name like X-00001-of-00003.gguf"
        )
    first: dict[str, Any] = {}
    tensors = {}
    for i, part in enumerate(parts):
        found, here = _read_part(part)
        if found.get("split.no") != i:
            raise UserError(f"{part}: split.no is {found.get('split.no')}, expected {i}")
        if twice := tensors.keys() & here.keys():
            raise UserError(f"{part}: tensor {min(twice)!r} is in another part, too")
        first = first or found
        tensors |= here
    if (expected := first.get("split.tensors.count", len(tensors))) != len(tensors):
        raise UserError(f"{parts[0]}: {len(tensors)} tensors in all parts, expected {expected}")
    return GGUF(parts[0], parts, first, tensors)


def split_parts(path: pathlib.Path) -> list[pathlib.Path]:
    """All parts of a split file by the name of any of them; the file alone where it is none. They may not exist."""
    if (match := SPLIT.fullmatch(path.name)) is None:
        return [path]
    return [path.with_name(f"{match[1]}-{i:05d}-of-{match[3]}.gguf") for i in range(1, int(match[3]) + 1)]


def _read_part(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of one file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start[:4] != MAGIC:
                found = "is empty" if not start else f"begins with {start[:4]!r}"
                raise UserError(f"{path}: not a GGUF file ({found}, expected {MAGIC!r})")
            if size < 24:
                raise UserError(f"{path}: truncated, {size} bytes found, at least 24 expected")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    version = int.from_bytes(start[4:], "little")
    if version & 0xFFFF == 0:
        raise UserError(f"{path}: a big-endian GGUF file, expected a little-endian one")
    if version not in VERSIONS:
        raise UserError(f"{path}: GGUF version {version}, expected {' or '.join(map(str, VERSIONS))}")
    try:
        return _Header(path, data).read()
    except (struct.error, _EndOfFileError) as error:
        raise UserError(f"{path}: truncated or damaged, its header goes beyond its {size} bytes") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: damaged, a string in its header is not UTF-8") from error


class _EndOfFileError(Exception):
    """A length in the header points beyond the end of the file."""


class _Header:
    """A cursor over the bytes of a file, after magic and version."""

    def __init__(self, path: pathlib.Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 8

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensor_count, key_count = self.take("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self.string()
            metadata[key] = self.value(*self.take("I"))
        entries = [self.entry() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise UserError(f"{self.path}: general.alignment is {alignment!r}, expected a positive number")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, Tensor] = {}
        for name, shape, code, offset in entries:
            if name in tensors:
                raise UserError(f"{self.path}: tensor {name!r} is there twice")
            tensors[name] = self.tensor(name, shape, code, start + offset)
        return metadata, tensors

    def take(self, format: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{format}", self.data, self.at)
        self.at += struct.calcsize(f"<{format}")
        return values

    def raw(self, length: int) -> bytes:
        if length > len(self.data) - self.at:
            raise _EndOfFileError
        self.at += length
        return self.data[self.at - length : self.at]

    def string(self) -> str:
        return self.raw(*self.take("Q")).decode()

    def value(self, code: int) -> Any:
        if code == GGUFValueType.STRING:
            return self.string()
        if code == GGUFValueType.ARRAY:
            item, count = self.take("IQ")
            if item == GGUFValueType.STRING:
                return [self.string() for _ in range(count)]
            kind = np.dtype(f"<{self.scalar(item)}")
            return np.frombuffer(self.raw(count * kind.itemsize), kind).tolist()
        return self.take(self.scalar(code))[0]

    def scalar(self, code: int) -> str:
        try:
            return _SCALARS[GGUFValueType(code)]
        except (ValueError, KeyError):
            raise UserError(
                f"{self.path}: damaged, its header holds a value of type {code}, expected 0 to 12"
            ) from None

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        (dimensions,) = self.take("I")
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise UserError(
                f"{self.path}: tensor {name!r} has {dimensions} dimensions, expected 1 to {_MOST_DIMENSIONS}"
            )
        shape = self.take(f"{dimensions}Q")[::-1]
        return name, shape, *self.take("IQ")  # type: ignore[return-value]

    def tensor(self, name: str, shape: tuple[int, ...], code: int, start: int) -> Tensor:
        try:
            kind = GGMLQuantizationType(code)
        except ValueError:
            raise UserError(f"{self.path}: tensor {name!r} is of type {code}, which gguf does not know") from None
        block, width = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise UserError(f"{self.path}: tensor {name!r} has rows of {shape[-1]}, expected a multiple of {block}")
        rows, row_bytes = math.prod(shape[:-1]), shape[-1] // block * width
        if (end := start + rows * row_bytes) > len(self.data):
            raise UserError(f"{self.path}: truncated, {len(self.data)} bytes found, {end} expected (tensor {name!r})")
        values = np.frombuffer(self.data, np.uint8, rows * row_bytes, start)
        return Tensor(self.path, name, kind, shape, values.reshape(rows, row_bytes))


def _shortest(value: Any) -> float:
    """A float32 number as it was written down: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if np.float32(value) == value else float(value)
