"""A small GGUF file that these tests share."""

from __future__ import annotations

import pathlib
import shutil

import pytest
from support import gguf_files


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    model = gguf_files.random_model("llama")
    return gguf_files.write_gguf("llama", model, tmp_path_factory.mktemp("made") / "small.gguf", "Q8_0")


@pytest.fixture
def file(made, tmp_path, monkeypatch):
    """A file of one's own, and a cache directory of one's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return pathlib.Path(shutil.copy(made, tmp_path))
