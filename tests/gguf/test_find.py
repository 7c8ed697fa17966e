"""Which GGUF file is meant: the only one of a directory, one of a Hub repository, with and without a network."""

from __future__ import annotations

import pathlib
import shutil

import pytest

from mlx_redrafter.errors import UserError
from mlx_redrafter.gguf import find
from mlx_redrafter.gguf.find import find_gguf, is_gguf


def test_the_only_one_of_a_directory(file, tmp_path):
    assert is_gguf(str(tmp_path)) and find_gguf(str(tmp_path), "--model") == file
    (tmp_path / "config.json").write_text("{}")
    assert not is_gguf(str(tmp_path))


def test_hub_repository(file, monkeypatch):
    files = ["README.md", "x-Q4_0.gguf", "big/x-00001-of-00002.gguf", "big/x-00002-of-00002.gguf"]
    asked = []
    monkeypatch.setattr(find.HfApi, "list_repo_files", lambda self, repo: files)
    monkeypatch.setattr(find, "hf_hub_download", lambda repo, name: asked.append(name) or f"/hub/{name}")
    assert is_gguf("owner/x-GGUF") and not is_gguf("owner/x") and is_gguf("owner/x", "Q4_0")
    assert find_gguf("owner/x-GGUF", "--model", "q4_0") == pathlib.Path("/hub/x-Q4_0.gguf")
    assert find_gguf("owner/x-GGUF", "--model", "big/x") == pathlib.Path("/hub/big/x-00001-of-00002.gguf")
    assert asked == files[1:]
    with pytest.raises(UserError, match=r"holds 2 GGUF files; name one with --gguf: big/x-00001-of-00002.gguf, x-Q4_0"):
        find_gguf("owner/x-GGUF", "--model")


def test_hub_repository_without_network(file, tmp_path, monkeypatch):
    def no_network(*_):
        raise ConnectionError("no network")

    monkeypatch.setattr(find.HfApi, "list_repo_files", no_network)
    snapshot = tmp_path / "models--owner--x-GGUF/snapshots/0123"
    snapshot.mkdir(parents=True)
    shutil.copy(file, snapshot / "x-Q8_0.gguf")
    scan = find.scan_cache_dir
    monkeypatch.setattr(find, "scan_cache_dir", lambda: scan(tmp_path))
    monkeypatch.setattr(find, "hf_hub_download", lambda repo, name: str(snapshot / name))
    assert find_gguf("owner/x-GGUF", "--model") == snapshot / "x-Q8_0.gguf"
    with pytest.raises(UserError, match="--model owner/y-GGUF: not here, and the Hub: no network"):
        find_gguf("owner/y-GGUF", "--model")


def test_a_directory_of_the_hubs_cache(file, tmp_path):
    """If this fails, what `hf download` left can only be named by the file in its snapshot."""
    repo = tmp_path / "models--owner--x-GGUF"
    (repo / "blobs").mkdir(parents=True)
    (snapshot := repo / "snapshots/0123").mkdir(parents=True)
    (snapshot / "x-Q8_0.gguf").symlink_to(file.rename(repo / "blobs/4567"))
    assert is_gguf(str(repo)) and find_gguf(str(repo), "--model") == snapshot / "x-Q8_0.gguf"
