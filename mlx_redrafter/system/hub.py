"""The Hugging Face Hub: repositories to local directories, and directories to repositories.

Knows nothing of what the files hold.
"""

from __future__ import annotations

import pathlib
import re

from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from mlx_redrafter.errors import UserError, one_line

MODEL_PATTERNS = ["*.json", "model*.safetensors", "*.py", "tokenizer.model"]
MODEL_PATTERNS += ["*.tiktoken", "*.txt", "*.jsonl", "*.jinja"]


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
            return snapshot_of(path)
        if path.exists():
            hint = " (`mlx-redrafter convert target` makes one of a GGUF file)" if path.suffix == ".gguf" else ""
            if (path.parent / "config.json").exists():
                hint = f"; the one that it is in, {path.parent}, may be meant"
            raise UserError(f"{flag} {path_or_repo}: is a file, expected a directory{hint}")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{flag} {path_or_repo}: not a usable path ({one_line(error)})") from error
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", path_or_repo):
        raise UserError(f"{flag} {path_or_repo}: no such directory (a Hub id looks like owner/name)")
    try:
        allow = patterns or MODEL_PATTERNS
        return pathlib.Path(snapshot_download(path_or_repo, repo_type=repo_type, allow_patterns=allow))
    except Exception as error:  # whatever the network, the Hub and the disk come up with half-way
        raise UserError(f"{flag} {path_or_repo}: {_refusal(error)}") from error


def _refusal(error: Exception) -> str:
    """Why a repository cannot be downloaded, for people."""
    if isinstance(error, GatedRepoError):
        return "access to this repository is gated; accept its terms on the Hub and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "no such directory here and no such repository on the Hub"
    if isinstance(error, (LocalEntryNotFoundError, HFValidationError)):
        return f"no such directory here, and the Hub: {one_line(error)}"
    return f"the download broke off ({one_line(error)}); whole files are kept for the next try"


def snapshot_of(folder: pathlib.Path) -> pathlib.Path:
    """The files in a directory of the Hub's cache (models--owner--name); any other directory as it is.

    Of several snapshots it is the one that refs/main names, else the newest.

    Raises:
        UserError: a directory of the cache that holds no snapshot.
    """
    if "--" not in folder.resolve().name or not any((folder / name).is_dir() for name in ("snapshots", "refs")):
        return folder
    main, found = folder / "refs" / "main", [path for path in folder.glob("snapshots/*") if path.is_dir()]
    named = folder / "snapshots" / (main.read_text().strip() if main.is_file() else "")
    if named in found:
        return named
    if not found:
        raise UserError(f"{folder}: a directory of the Hub's cache without a snapshot; the download did not end")
    return max(found, key=lambda path: path.stat().st_mtime)


def require_login(repo: str) -> None:
    """Raises UserError unless the Hub knows who we are, before any work is done."""
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UserError(f"--upload-repo is {repo!r}, expected owner/name")
    try:
        HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no network
        raise UserError(
            f"--upload-repo {repo}: the Hub does not let us in ({one_line(error)}); log in with `hf auth login`"
        ) from error


def upload(folder: pathlib.Path, repo: str, source: str, ignore: list[str] | None = None) -> str:
    """Uploads a directory, with a model card if it has none.

    Args:
        source: what it was converted from; the card names it if it is a Hub id.
        ignore: patterns of files that stay here.

    Returns:
        the address.

    Raises:
        UserError: the Hub refuses, or the network fails. The directory stays.
    """
    api = HfApi()
    try:
        address = str(api.create_repo(repo, exist_ok=True))
        if not (folder / "README.md").exists():
            origin = None if pathlib.Path(source).expanduser().exists() else source
            link = f" from [{origin}](https://huggingface.co/{origin})" if origin else ""
            card = model_card(f"# {repo}\n\nConverted by mlx-redrafter{link}.\n", ["mlx", "mlx-redrafter"], origin)
            card.save(folder / "README.md")
        api.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=ignore)
    except Exception as error:  # whatever the network and the Hub come up with
        raise UserError(f"--upload-repo {repo}: {one_line(error)}; what was to go there is in {folder}") from error
    return address


def model_card(text: str, tags: list[str], base_model: str | None = None) -> ModelCard:
    """A README.md for the Hub: `text` in Markdown under the header that the Hub reads."""
    data = ModelCardData(library_name="mlx", tags=tags, base_model=base_model)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
