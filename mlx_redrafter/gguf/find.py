"""Which GGUF file a path, a directory or a Hub repository means."""

from __future__ import annotations

import pathlib
import re

from huggingface_hub import HfApi, hf_hub_download, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.gguf.file import MAGIC, SPLIT, split_parts
from mlx_redrafter.system.hub import snapshot_of

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_PROJECTOR = "mmproj"  # llama.cpp's files for images, beside those of language models


def is_gguf(path_or_repo: str, name: str | None = None) -> bool:
    """Whether a GGUF file is meant: a file, a directory with nothing else in it, or a Hub repository called so.

    Args:
        name: what was typed for --gguf; it settles the matter.
    """
    try:
        path = pathlib.Path(path_or_repo).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError):
        return False  # too long, or with a null byte: no path at all, as whoever reads directories will say
    if name is not None:
        return True
    if path.is_dir():
        path = snapshot_of(path)
        return not (path / "config.json").exists() and bool(_models(file.name for file in path.glob("*.gguf")))
    if path.is_file():
        return path.suffix == ".gguf" or _magic(path) == MAGIC
    return path.suffix == ".gguf" or (bool(_HUB_ID.fullmatch(path_or_repo)) and "gguf" in path_or_repo.lower())


def find_gguf(path_or_repo: str, flag: str, name: str | None = None) -> pathlib.Path:
    """The file; of a split one, the first part. A Hub repository's is downloaded, with progress bars.

    Args:
        path_or_repo: a file, a directory, or a Hub id "owner/name".
        flag: what the user typed it for, for messages.
        name: of the file, or a part of the name that no other has; needed only where there are several.

    Raises:
        UserError: there is none, there are several and none is named, or the download broke off.
    """
    path = pathlib.Path(path_or_repo).expanduser()
    if path.is_file():
        return split_parts(path)[0]
    if path.is_dir():
        path = snapshot_of(path)
        return path / _choose([file.name for file in path.glob("*.gguf")], f"{flag} {path_or_repo}", name)
    if not _HUB_ID.fullmatch(path_or_repo):
        raise UserError(f"{flag} {path_or_repo}: no such file or directory (a Hub id looks like owner/name)")
    try:
        files = HfApi().list_repo_files(path_or_repo)
    except Exception as error:  # whatever the network and the Hub come up with
        if not (files := _downloaded(path_or_repo)):
            raise UserError(f"{flag} {path_or_repo}: not here, and the Hub: {one_line(error)}") from error
    chosen = _choose([file for file in files if file.endswith(".gguf")], f"{flag} {path_or_repo}", name)
    try:
        parts = [hf_hub_download(path_or_repo, part.as_posix()) for part in split_parts(pathlib.Path(chosen))]
    except Exception as error:
        raise UserError(f"{flag} {path_or_repo}: the download broke off ({one_line(error)})") from error
    return pathlib.Path(parts[0])


def _downloaded(repo: str) -> list[str]:
    """The files of a Hub repository that are here from an earlier download."""
    try:
        repos = [found for found in scan_cache_dir().repos if found.repo_id == repo]
    except CacheNotFound:
        return []
    return sorted(
        {
            file.file_path.relative_to(revision.snapshot_path).as_posix()
            for found in repos
            for revision in found.revisions
            for file in revision.files
        }
    )


def _choose(files: list[str], place: str, name: str | None) -> str:
    """One of several files by its name or a part of it. Raises UserError that lists them."""
    files = _models(files)
    if not files:
        raise UserError(f"{place}: no .gguf file in it")
    if name is None:
        if len(files) == 1:
            return files[0]
        raise UserError(f"{place}: holds {len(files)} GGUF files; name one with --gguf: {', '.join(files)}")
    found = [file for file in files if file == name] or [file for file in files if name.lower() in file.lower()]
    if len(found) == 1:
        return found[0]
    what = f"stands for {len(found)} files" if found else "is no file here"
    raise UserError(f"{place}: --gguf {name} {what}; expected one of: {', '.join(found or files)}")


def _models(files: object) -> list[str]:
    """The files of language models, of split ones the first part."""
    kept = []
    for file in sorted(files):  # type: ignore[call-overload]
        match = SPLIT.fullmatch(file.rsplit("/", 1)[-1])
        if (match is None or int(match[2]) == 1) and not file.rsplit("/", 1)[-1].startswith(_PROJECTOR):
            kept.append(file)
    return kept


def _magic(path: pathlib.Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC))
    except OSError:
        return b""
