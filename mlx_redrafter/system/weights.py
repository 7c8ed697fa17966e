"""Weights: the files that a directory has, tensor by tensor onto the disk, and what they weigh.

Knows nothing of what the tensors are for. Writing is our own because mlx holds a whole
file's tensors in memory to save them. Here a lazy tensor is computed, written and let go
before the next one is looked at.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from tqdm import tqdm

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import check_safetensors, read_json, read_safetensors, write_json
from mlx_redrafter.system.hub import MODEL_PATTERNS

SHARD_BYTES = 5 * 2**30  # mlx-lm's
Shapes = dict[str, tuple[str, tuple[int, ...]]]  # of tensors: type, a key of ITEM_BYTES, and shape
Read = Callable[[str], bytes | memoryview]  # a tensor's bytes
_PIECES, _PIECE = 64, 65536  # of a file, and bytes of each, that tell its contents from another's
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.\w+")
# The types of the safetensors format that mlx has, by the names that mlx and PyTorch give them.
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"}
TYPES |= {f"int{bits}": f"I{bits}" for bits in (64, 32, 16, 8)} | {
    f"uint{bits}": f"U{bits}" for bits in (64, 32, 16, 8)
}
# The bytes of one item of each.
ITEM_BYTES = {name: 1 if name == "BOOL" else int(name.lstrip("BFIU")) // 8 for name in TYPES.values()}


def find_weights(folder: pathlib.Path, stem: str = "model", suffix: str = ".safetensors") -> list[pathlib.Path]:
    """The weight files of one kind: those an index names, else `stem`, else its numbered shards.

    mlx-lm reads every file `model*.safetensors`, in the directory's own order, so a copy that
    lies beside them would win now and then. There may be none.

    Args:
        stem, suffix: "model" and ".safetensors", or "pytorch_model" and ".bin".

    Returns:
        the files; none if there is no such kind here.

    Raises:
        UserError: a file that the index or the numbers promise is not there, or there is
            another one that they do not name.
    """
    index, whole = folder / f"{stem}{suffix}.index.json", folder / f"{stem}{suffix}"
    named = there = sorted(folder.glob(f"{stem}*{suffix}"))
    promise, refusal = "", f"{whole.name} is the model"
    if index.exists():
        named = sorted({folder / name for name in read_index(index).values()})
        promise, refusal = f"{index.name} names it", f"{index.name} does not name it"
    elif whole.exists():
        named = [whole]
    elif shards := [match for path in there if (match := _SHARD.fullmatch(path.name))]:
        start, digits, count = shards[0].groups()
        named = [folder / f"{start}-{i:0{len(digits)}d}-of-{count}{suffix}" for i in range(1, int(count) + 1)]
        promise = f"{shards[0].string} is one of {int(count)}"
        refusal = promise
    for path in named:
        if not path.exists():
            raise UserError(f"{path}: no such file, though {promise}")
    if stray := sorted(set(there) - set(named)):
        raise UserError(f"{stray[0]}: is there, but {refusal}; move it to another directory")
    return named


def digests(folder: pathlib.Path) -> dict[str, str]:
    """Of each file that a model is read from, of weights the header and some pieces; and the names of all."""
    patterns = {*MODEL_PATTERNS, "*.safetensors"}
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.name[0] != "."})
    found = {f"{folder.name}/": " ".join(file.name for file in files)}
    for file in files:
        size = file.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with file.open("rb") as stream:
            for place in range(0, size, max(_PIECE, size // _PIECES)):
                stream.seek(place)
                digest.update(stream.read(_PIECE))
        found[f"{folder.name}/{file.name}"] = digest.hexdigest()[:16]
    return found


def read_index(index: pathlib.Path) -> dict[str, str]:
    """Tensor name -> file name. Raises UserError."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) and "/" not in name for name in found.values()):
        raise UserError(f"{index}: expected a JSON object with a weight_map of tensor names to file names")
    return found


def check_weights(files: Iterable[pathlib.Path]) -> None:
    """Raises UserError where safetensors files are damaged, hold a tensor twice, or others than their index says."""
    places: dict[str, pathlib.Path] = {}
    for file in files:
        for name in check_safetensors(file):
            if name in places:
                raise UserError(f"{file}: tensor {name!r} is in {places[name].name}, too")
            places[name] = file
    for index in {file.parent / "model.safetensors.index.json" for file in places.values()}:
        named = read_index(index) if index.exists() else {name: file.name for name, file in places.items()}
        for name, place in named.items():
            if name not in places or places[name].name != place:
                raise UserError(
                    f"{index.parent / place}: tensor {name!r} is missing, though {index.name} says it is there"
                )
        if more := sorted(places.keys() - named.keys()):
            raise UserError(f"{places[more[0]]}: tensor {more[0]!r} is there, but {index.name} does not name it")


def read_weights(files: Iterable[pathlib.Path]) -> dict[str, mx.array]:
    """All tensors of safetensors files, lazy. Raises UserError as `check_weights` does."""
    check_weights(files := list(files))
    return {name: value for file in files for name, value in read_safetensors(file).items()}


def tensors(model: nn.Module) -> dict[str, mx.array]:
    """All parameters of a model by name."""
    return dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]


def take_weights(model: nn.Module) -> dict[str, mx.array]:
    """All parameters of a model, which has none afterwards, so that nothing else keeps them in memory."""
    weights = tensors(model)
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))
    return weights


def save_weights(
    folder: pathlib.Path, weights: dict[str, mx.array], title: str, kind: str = "mlx", shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes weights as `write_shards` does.

    Args:
        weights: lazy or not; emptied on the way, so that memory never holds more than one of
            them that nobody else keeps.
    """
    shapes = {name: (TYPES[type_name(value)], value.shape) for name, value in weights.items()}

    def read(name: str) -> bytes | memoryview:
        value = mx.contiguous(weights.pop(name).reshape(-1))
        mx.eval(value)
        mx.clear_cache()  # or the buffers of other sizes would pile up
        return memoryview(value.view(mx.uint8)) if value.size else b""  # type: ignore[arg-type]

    write_shards(folder, shapes, read, title, kind, shard_bytes)


def write_shards(
    folder: pathlib.Path, shapes: Shapes, read: Read, title: str, kind: str = "mlx", shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes model.safetensors, or numbered shards and their index, with a progress bar.

    Args:
        shapes, read: as for `write_safetensors`.
        title: of the progress bar, which only a terminal shows.
        kind: the file's "format" metadata: "mlx", or "pt" for PyTorch's layout.
        shard_bytes: size of a file at most, unless one tensor alone is larger.

    Raises:
        OSError: the disk is full, or will be.
    """
    sizes = {name: ITEM_BYTES[dtype] * math.prod(shape) for name, (dtype, shape) in shapes.items()}
    shards: list[list[str]] = [[]]
    filled, total = 0, sum(sizes.values())
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    require_space(folder, total)
    places: dict[str, str] = {}
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None) as bar:
        for i, names in enumerate(shards, 1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(folder / file, {name: shapes[name] for name in names}, read, bar.update, kind)
            places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def write_safetensors(
    path: pathlib.Path, shapes: Shapes, read: Read, progress: Callable[[int], object], kind: str
) -> None:
    """Writes one safetensors file, asking for each tensor's bytes when it is its turn.

    Args:
        shapes: type (a key of ITEM_BYTES) and shape of each tensor, in the order to write.
        read: the bytes of a tensor, row-major, little-endian.
        progress: is told the bytes of each tensor written.
        kind: the "format" metadata.
    """
    header: dict[str, object] = {"__metadata__": {"format": kind}}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + ITEM_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            progress(file.write(read(name)))
    check_safetensors(path)


def require_space(folder: pathlib.Path, needed: int) -> None:
    """Raises OSError unless the disk has room, which is better known before the work than after it."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"no space left: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


def weights(module: nn.Module) -> tuple[int, int]:
    """Number of weights, and their bytes, as stored (a quantised matrix counts its packed words' bytes)."""
    arrays = tensors(module).values()
    return sum(a.size for a in arrays), sum(a.nbytes for a in arrays)


def describe(module: nn.Module) -> str:
    """The types and the size of a model's weights in a few words."""
    kinds = {f"{m.bits}-bit" for m in module.modules() if "scales" in m}
    kinds |= {type_name(a) for a in tensors(module).values() if mx.issubdtype(a.dtype, mx.floating)}
    return f"{' and '.join(sorted(kinds))}, {weights(module)[1] / 1e6:.1f} MB of weights"


def type_name(array: mx.array) -> str:
    """The type of an array as users write it, for instance float32."""
    return str(array.dtype).removeprefix("mlx.core.")
