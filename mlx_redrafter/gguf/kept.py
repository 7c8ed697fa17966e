"""GGUF files converted once: the model directories in the cache directory."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import sys

from mlx_redrafter.errors import UserError
from mlx_redrafter.gguf.file import split_parts
from mlx_redrafter.gguf.find import find_gguf, is_gguf
from mlx_redrafter.gguf.model import write_model
from mlx_redrafter.system.files import write_directory
from mlx_redrafter.system.openblas import cache_dir

VERSION = 1  # of what is written; another one is written anew


def as_directory(path_or_repo: str, flag: str, name: str | None = None) -> str:
    """What was given, or the directory that its GGUF file is converted to where it means one.

    Args:
        path_or_repo: a directory, a GGUF file or a Hub id.
        flag: what the user typed it for, for messages.
        name: what was typed for --gguf.

    Raises:
        UserError: see `find_gguf` and `converted`.
    """
    if not is_gguf(path_or_repo, name):
        return path_or_repo
    return str(converted(find_gguf(path_or_repo, flag, name)))


def converted(path: pathlib.Path, dtype: str | None = None) -> pathlib.Path:
    """The mlx-lm directory of a GGUF file, made now unless it is there already.

    It is made under another name and renamed when it is whole. A file that has changed since is
    converted anew, and what was made of it before is removed. One line on standard error tells.

    Args:
        path: the file, or the first part of a split one.
        dtype: write all weights as numbers of this type; None keeps them packed.

    Raises:
        UserError: the file is not one that can be read, or the cache directory cannot be written.
    """
    folder = kept_folder(path, dtype)
    if folder.exists():
        return folder
    try:
        with write_directory(folder) as made:
            summary = write_model(path, made, dtype is not None, dtype)
    except UserError:
        if folder.exists():  # another process was faster
            return folder
        raise
    print(f"{path}: converted to {folder} ({summary})", file=sys.stderr)
    for other in folder.parent.glob(f"{folder.name.rsplit('-', 1)[0]}-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def kept_folder(path: pathlib.Path, dtype: str | None = None) -> pathlib.Path:
    """Where the directory of a file is: a name from its place and `dtype`, one from its sizes and times of change.

    Raises:
        UserError: no such file.
    """
    facts = []
    for part in split_parts(path):
        try:
            fact = part.stat()
        except OSError as error:
            raise UserError(f"{part}: cannot be read ({error.strerror or error})") from error
        facts.append((fact.st_size, fact.st_mtime_ns))
    place = _digest(f"{path.resolve()}{dtype or ''}")
    return cache_dir() / "gguf" / f"{path.stem}-{place}-{_digest(json.dumps([VERSION, facts]))}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
