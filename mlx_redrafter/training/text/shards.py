"""Writes and reads rows of tokens: memory-mapped shards, and a manifest. Knows nothing of how rows are made.

A folder holds `manifest.json`, training shards `shard-00000.npy`, ... and `held-out.npy`.
A shard is one file, written whole or not at all. Its content depends on the settings and its
number alone. So a stopped run goes on after its last whole shard, and ends with the same
files as an undisturbed one, byte for byte.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.system.files import read_json, remove_left_over, replace_file, write_json

MANIFEST, HELD_OUT = "manifest.json", "held-out.npy"
FORMAT = 1
OPEN_SHARDS = 32  # each open shard holds a file descriptor, of which macOS gives 256


Progress = Callable[[int], Any]  # is told a number of tokens
Marked = tuple[Sequence[int], np.ndarray]  # token ids, and (n,) bool: is it to be learned


@dataclasses.dataclass
class Shard:
    """What goes into one file.

    Attributes:
        tokens: (R, T) int32; padding is 0.
        counts: (R, T) bool; True for the tokens that are to be learned.
        facts: what was left out or cut, for the manifest.
    """

    tokens: np.ndarray
    counts: np.ndarray
    facts: dict[str, int] = dataclasses.field(default_factory=dict)


def shard_of(rows: Sequence[Marked], length: int, facts: dict[str, int] | None = None) -> Shard:
    """A shard of rows of at most `length` tokens. What is first in a row has nothing to be guessed from."""
    tokens, counts = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for row, (ids, marks) in enumerate(rows):
        tokens[row, : len(ids)], counts[row, 1 : len(ids)] = ids, marks[1:]
    return Shard(tokens, counts, facts or {})


Make = Callable[[int, Progress], Shard]


@dataclasses.dataclass
class Recipe:
    """How the rows of a folder come about.

    Attributes:
        settings: everything the content depends on, as JSON keeps it; keys are the names of flags.
        make: gives training shard k for k in 0..shards-1, and the held-out rows for k = shards;
            tells of tokens as they are written.
        limit: training rows at most; what is beyond is cut off.
    """

    settings: dict[str, Any]
    length: int
    shards: int
    make: Make
    held_out: bool
    limit: int | None = None


class Rows:
    """The rows of finished folders, read as they are asked for.

    Training rows come first; the last `held_out` rows are for evaluation.

    Attributes:
        manifests: of the folders.

    Raises:
        UserError: no manifest, rows that are not all written or of several lengths, or a damaged shard.
    """

    def __init__(self, *folders: str | pathlib.Path):
        shards: list[tuple[pathlib.Path, dict[str, Any]]] = []
        self.manifests: list[dict[str, Any]] = []
        self.length = self.held_out = 0
        for folder in map(pathlib.Path, folders):
            manifest = read_json(folder / MANIFEST)
            if not manifest.get("complete"):
                raise UserError(f"{folder}: its rows are not all written; run the same command again to go on")
            if self.length not in (0, manifest["length"]):
                raise UserError(f"{folder}: rows of {manifest['length']} tokens beside others of {self.length}")
            self.length = manifest["length"]
            self.held_out += manifest["held_out"]
            self.manifests.append(manifest)
            shards += [(folder, shard) for shard in manifest["shards"]]
        shards.sort(key=lambda found: found[1]["file"] == HELD_OUT)
        for folder, shard in shards:
            if not _whole(folder, shard):
                raise UserError(f"{folder / shard['file']}: missing or truncated; run the same command again")
        self._files = [folder / shard["file"] for folder, shard in shards]
        self._ends = np.cumsum([shard["rows"] for _, shard in shards])
        self._open = functools.lru_cache(OPEN_SHARDS)(self._map)

    def _map(self, shard: int) -> Any:
        try:
            return np.load(self._files[shard], mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{self._files[shard]}: cannot be read ({one_line(error)})") from error

    def __len__(self) -> int:
        """All rows, the held-out ones included."""
        return int(self._ends[-1])

    def __getitem__(self, picks: np.ndarray | Sequence[int] | slice) -> tuple[np.ndarray, np.ndarray]:
        """Rows by number.

        Returns:
            tokens (B, T) int32, and counts (B, T) bool: whether a token is to be learned. The
            first token of a document never is, so where all of t+1..t+k count, they belong
            to one document.

        Raises:
            IndexError: a number that is not one of the rows.
        """
        if isinstance(picks, slice):
            picks = np.arange(*picks.indices(len(self)))
        wanted = np.asarray(picks, np.int64)
        if wanted.size and not (-len(self) <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"rows {wanted.min()} to {wanted.max()} of {len(self)}")
        wanted = wanted % max(1, len(self))
        tokens = np.zeros((len(wanted), self.length), np.int32)
        counts = np.zeros((len(wanted), self.length), bool)
        owners = np.searchsorted(self._ends, wanted, side="right")
        for owner in np.unique(owners):
            here = owners == owner
            shard = self._open(int(owner))
            found = shard[wanted[here] - (self._ends[owner - 1] if owner else 0)]
            tokens[here], counts[here] = found["tokens"], found["counts"]
        return tokens, counts


def write_rows(folder: str | pathlib.Path, recipe: Recipe) -> Rows:
    """Writes what is missing of a folder's shards, and opens it.

    Raises:
        UserError: the folder was begun with other settings, cannot be written, or there is nothing to learn.
    """
    folder = pathlib.Path(folder)
    settings = json.loads(json.dumps(recipe.settings))
    file = folder / MANIFEST
    done = _begun(file, settings) if file.exists() else {}
    remove_left_over(folder)
    names = [f"shard-{number:05d}.npy" for number in range(recipe.shards)] + [HELD_OUT] * recipe.held_out
    entries: list[dict[str, Any]] = []

    def save(rest: list[str], complete: bool = False) -> None:
        held_out = sum(entry["rows"] for entry in entries if entry["file"] == HELD_OUT)
        facts = {"complete": complete, "rows": sum(entry["rows"] for entry in entries), "held_out": held_out}
        missing = [{"file": name, "complete": False} for name in rest]
        manifest = {"format": FORMAT, "settings": settings, "length": recipe.length} | facts
        write_json(file, manifest | {"shards": entries + missing}, indent=1)

    with tqdm(total=len(names), desc="text", unit="shard") as bar:
        progress, total = _rate(bar), 0
        for number, name in enumerate(names):
            left = None if name == HELD_OUT or recipe.limit is None else recipe.limit - total
            bar.update()
            if left is not None and left <= 0:
                continue
            entry = done.get(name)
            if entry is None or not _whole(folder, entry):
                entry = _write(folder / name, recipe.make(number, progress), recipe.length, left)
            entries.append(entry)
            total += entry["rows"]
            save(names[number + 1 :])
    if not any(entry["learned"] for entry in entries if entry["file"] != HELD_OUT):
        raise UserError(f"{folder}: no row has a token to learn; are all prompts longer than --row-length?")
    save([], complete=True)
    return Rows(folder)


def _rate(bar: tqdm) -> Progress:
    """Shows tokens per second beside a bar, about once a second."""
    begun = shown = time.perf_counter()
    seen = 0

    def progress(tokens: int) -> None:
        nonlocal seen, shown
        seen += tokens
        if (now := time.perf_counter()) > shown + 1:
            bar.set_postfix_str(f"{seen / (now - begun):.0f} tokens/s")
            shown = now

    return progress


def _write(path: pathlib.Path, shard: Shard, length: int, left: int | None) -> dict[str, Any]:
    kept = len(shard.tokens) if left is None else min(left, len(shard.tokens))
    rows = np.zeros(kept, [("tokens", "<i4", (length,)), ("counts", "?", (length,))])
    rows["tokens"], rows["counts"] = shard.tokens[:kept], shard.counts[:kept]
    data = io.BytesIO()
    np.save(data, rows)  # to memory first: numpy's own message for a full disk does not say that it is full
    with replace_file(path) as temporary:
        temporary.write_bytes(data.getbuffer())
    facts = {"bytes": data.getbuffer().nbytes, "learned": int(rows["counts"].sum())}
    return {"file": path.name, "complete": True, "rows": kept} | facts | shard.facts


def _begun(file: pathlib.Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The whole shards of a folder by file name. Raises UserError where its settings are others."""
    manifest = read_json(file)
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("settings"), dict):
        raise UserError(f"{file}: expected a manifest of format {FORMAT}, found {manifest.get('format')!r}")
    begun = manifest["settings"]
    for name in settings | begun:
        was, now = begun.get(name), settings.get(name)
        if was == now:
            continue
        if name == "files":
            was_files, now_files = ({f["path"]: f["sha256"] for f in files or []} for files in (was, now))
            path = next((p for p in was_files | now_files if was_files.get(p) != now_files.get(p)), None)
            if path is None:
                path, how = "the files", "were given in another order"
            else:
                how = "is new" if path not in was_files else "is gone" if path not in now_files else "changed"
            raise UserError(f"{file.parent}: {path} {how} since its rows were begun; use a new directory")
        raise UserError(f"{file.parent}: --{name} is {now}, but its rows were begun with {was}; use a new directory")
    return {shard["file"]: shard for shard in manifest["shards"] if shard.get("complete")}


def _whole(folder: pathlib.Path, entry: dict[str, Any]) -> bool:
    try:
        return (folder / entry["file"]).stat().st_size == entry["bytes"]
    except OSError:
        return False
