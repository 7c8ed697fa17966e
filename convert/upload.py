"""What was converted, to the Hub, by huggingface-hub."""

from __future__ import annotations

import pathlib

from huggingface_hub import HfApi, ModelCard, ModelCardData

from mlx_redrafter.errors import UserError, one_line


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
        UserError: the Hub refuses, or the network fails. The directory stays, and the same
            upload goes on from where it was.
    """
    api = HfApi()
    try:
        address = str(api.create_repo(repo, exist_ok=True))
        if not (folder / "README.md").exists():
            _card(repo, source).save(folder / "README.md")
        api.upload_large_folder(repo_id=repo, folder_path=str(folder), repo_type="model", ignore_patterns=ignore)
    except Exception as error:  # whatever the network and the Hub come up with
        raise UserError(f"--upload-repo {repo}: {one_line(error)}; what was to go there is in {folder}") from error
    return address


def _card(repo: str, source: str) -> ModelCard:
    origin = None if pathlib.Path(source).expanduser().exists() else source
    data = ModelCardData(library_name="mlx", tags=["mlx", "mlx-redrafter"], base_model=origin)
    text = f"# {repo}\n\nConverted by mlx-redrafter" + (
        f" from [{origin}](https://huggingface.co/{origin})" if origin else ""
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}.\n")
