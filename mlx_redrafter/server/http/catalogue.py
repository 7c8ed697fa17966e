"""Which models a client may ask for. Knows nothing of what is loaded."""

from __future__ import annotations

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

NEEDED = {"config.json", "tokenizer_config.json"}


def in_hub_cache() -> set[str]:
    """Ids of the repositories in the Hub's cache that look like models."""
    try:
        repos = [repo for repo in scan_cache_dir().repos if repo.repo_type == "model" and "main" in repo.refs]
    except CacheNotFound:
        return set()
    files = {repo.repo_id: {file.file_name for file in repo.refs["main"].files} for repo in repos}
    return {n for n, names in files.items() if names >= NEEDED and any(f.endswith(".safetensors") for f in names)}
