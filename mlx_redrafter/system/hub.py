"""From a path or a Hub id to a local directory."""

from __future__ import annotations

import pathlib
import re

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from mlx_redrafter.errors import UserError, one_line

MODEL_PATTERNS = [
    "*.json",
    "model*.safetensors",
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "*.txt",
    "*.jsonl",
    "*.jinja",
]


def fetch(
    path_or_repo: str, flag: str, patterns: list[str] | None = None, repo_type: str | None = None
) -> pathlib.Path:
    """A local directory as it is, or a Hub repository downloaded, with progress bars.

    huggingface-hub takes up a broken connection where it broke, five times per file; between
    runs it keeps the files that are whole.

    Args:
        path_or_repo: directory, or Hub id "owner/name".
        flag: what the user typed it for, for messages.
        patterns: file patterns to download; None for what a model needs.
        repo_type: "dataset" for a data set; None for a model.

    Raises:
        UserError: no such directory, no such repository, no access, no network, a download
            that broke off, or a full disk.
    """
    try:
        path = pathlib.Path(path_or_repo).expanduser()
        if path.is_dir():
            return path
        if path.exists():
            raise UserError(f"{flag} {path_or_repo}: is a file, expected a directory")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{flag} {path_or_repo}: not a usable path ({one_line(error)})") from error
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", path_or_repo):
        raise UserError(f"{flag} {path_or_repo}: no such directory (a Hub id looks like owner/name)")
    try:
        allow = patterns or MODEL_PATTERNS
        return pathlib.Path(snapshot_download(path_or_repo, repo_type=repo_type, allow_patterns=allow))
    except GatedRepoError as error:
        raise UserError(
            f"{flag} {path_or_repo}: access to this repository is gated; accept its terms on the Hub"
            " and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{flag} {path_or_repo}: no such directory here and no such repository on the Hub") from error
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise UserError(f"{flag} {path_or_repo}: no such directory here, and the Hub: {one_line(error)}") from error
    except Exception as error:  # whatever the network, the Hub and the disk come up with half-way
        raise UserError(
            f"{flag} {path_or_repo}: the download broke off ({one_line(error)}); whole files are kept for the next try"
        ) from error
