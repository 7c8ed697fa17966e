"""Keeps KV caches of prompts on disk, within a limit; what is damaged or half-written is dropped, and said.

Knows nothing of requests. A directory holds, for each model, files that are named by the hash of their content.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.server.answers import logger
from mlx_redrafter.system.files import read_json, write_json
from mlx_redrafter.text.prompt_cache import load_cache_file, save_cache_file

NEW, USES = "new.safetensors", "uses.json"


@dataclasses.dataclass
class Kept:
    """One file.

    Attributes:
        tokens: whose rows it has; None while nobody has read it.
    """

    path: pathlib.Path
    size: int
    uses: int = 0
    tokens: list[int] | None = None

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"


class CacheFiles:
    """The files of all models, in one directory that is one server's at a time.

    Args:
        folder: made if it is not there, for its owner's eyes only: prompts can be read from it.
        max_bytes: of all files.

    Raises:
        UserError: it cannot be written, or another server uses it.
    """

    def __init__(self, folder: pathlib.Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = (folder / "lock").open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--prompt-cache-dir {folder}: another server uses it") from None
        except OSError as error:
            raise UserError(f"--prompt-cache-dir {folder}: cannot be written ({error.strerror})") from error
        self.kept = self._found()

    def _found(self) -> list[Kept]:
        """What the directory holds; what no write has finished is dropped."""
        try:
            uses = read_json(self.folder / USES)
        except UserError:
            uses = {}
        found = []
        for path in sorted(self.folder.glob("*/*"), key=lambda path: path.stat().st_mtime):
            if re.fullmatch(r"[0-9a-f]{64}\.safetensors", path.name):
                count = uses.get(path.name)
                found.append(Kept(path, path.stat().st_size, count if isinstance(count, int) else 0))
            elif path.name.endswith(NEW):
                self._drop(Kept(path, 0), "its writing was not finished")
        return found

    def read(self, model: nn.Module, identity: str, max_bytes: int) -> Iterator[tuple[list[int], list[Any]]]:
        """The tokens and caches of a model, the most used last, and no more than fit into so many bytes."""
        mine = [kept for kept in self.kept if kept.path.parent.name == identity]
        chosen: list[Kept] = []
        for kept in sorted(mine, key=lambda kept: (-kept.uses, -mine.index(kept))):
            if sum(one.size for one in chosen) + kept.size <= max_bytes:
                chosen.insert(0, kept)
        for kept in chosen:
            try:
                yield self._read(kept, model, identity)
            except (UserError, OSError, ValueError, KeyError, RuntimeError) as error:
                self.kept.remove(kept)
                self._drop(kept, one_line(error).replace(f"--prompt-cache-file {kept.path}: ", ""))

    def _read(self, kept: Kept, model: nn.Module, identity: str) -> tuple[list[int], list[Any]]:
        if _digest(kept.path) != kept.path.stem:
            raise UserError("damaged: its content is not what was written")
        cache, facts = load_cache_file(kept.path, model, identity)
        kept.tokens = [int(token) for token in json.loads(facts["tokens"])]
        mx.eval([c.state for c in cache])
        return kept.tokens, cache

    def write(self, identity: str, tokens: list[int], cache: list[Any], replaces_prefixes: bool) -> None:
        """Writes one cache, and removes what it makes superfluous, and what is used least beyond the limit.

        Args:
            replaces_prefixes: caches of prefixes of these tokens can be cut from this one.
        """
        if sum(c.nbytes for c in cache) > self.max_bytes:
            return
        folder = self.folder / identity
        try:
            save_cache_file(folder / NEW, cache, identity, {}, tokens=tokens)
            path = folder / f"{_digest(folder / NEW)}.safetensors"
            os.replace(folder / NEW, path)
        except (UserError, OSError) as error:
            logger.warning("prompt cache: %s", one_line(error))
            return
        new = Kept(path, path.stat().st_size, tokens=tokens)
        for kept in [one for one in self.kept if one.path.parent == folder]:
            same = kept.path == path
            prefix = kept.tokens is not None and kept.tokens == tokens[: len(kept.tokens)] and replaces_prefixes
            if same or prefix:
                new.uses = max(new.uses, kept.uses)
                self._remove(kept, delete=not same)
        for kept in sorted(self.kept, key=lambda kept: kept.uses):
            if sum(one.size for one in (*self.kept, new)) <= self.max_bytes:
                break
            self._remove(kept)
        self.kept.append(new)
        self._note_uses()

    def use(self, identity: str, prefix: list[int]) -> None:
        """Counts that what begins with a prefix was of use."""
        for kept in self.kept:
            if kept.path.parent.name == identity and kept.tokens is not None and kept.tokens[: len(prefix)] == prefix:
                kept.uses += 1
                return

    def close(self) -> None:
        """Notes the uses, and lets another server have the directory."""
        self._note_uses()
        self._lock.close()

    def _note_uses(self) -> None:
        try:
            write_json(self.folder / USES, {kept.path.name: kept.uses for kept in self.kept})
        except UserError as error:
            logger.warning("prompt cache: %s", error)

    def _remove(self, kept: Kept, delete: bool = True) -> None:
        self.kept.remove(kept)
        if delete:
            kept.path.unlink(missing_ok=True)

    def _drop(self, kept: Kept, why: str) -> None:
        logger.warning("prompt cache: dropped %s: %s", kept.name, why)
        kept.path.unlink(missing_ok=True)


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
