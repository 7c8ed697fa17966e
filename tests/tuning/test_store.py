"""What was measured and learnt is kept in files that are whole or count as none."""

import json

import pytest

from mlx_redrafter.system import openblas
from mlx_redrafter.tuning import store

KEY, FIELDS = {"device": "a device"}, {"costs": {"plain": {"128": 0.5}}, "drafters": {"abc": {"steps": 1}}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "tuning"))
    return tmp_path / "tuning"


def kept(key=KEY):
    fields = store.read(key)
    return {name: fields[name] for name in FIELDS if name in fields}


def test_files_there_and_back(folder):
    assert store.read(KEY) == {}
    file = store.write(KEY, FIELDS)
    assert file.parent == folder and list(folder.iterdir()) == [file]  # nothing half-written beside it
    assert kept() == FIELDS
    assert store.read({"device": "another"}) == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda fields: "",
        lambda fields: json.dumps(fields)[:100],
        lambda fields: "[]",
        lambda fields: json.dumps(fields | {"version": 0}),
        lambda fields: json.dumps(fields | {"key": {}}),
        lambda fields: b"\xff\xfe\x00",
    ],
    ids=range(6),
)
def test_damaged_files_count_as_none(folder, damage):
    """If this fails, a file that a crash or another version left breaks every text from then on."""
    file = store.write(KEY, FIELDS)
    content = damage(json.loads(file.read_text()))
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert store.read(KEY) == {}
    store.write(KEY, FIELDS)
    assert kept() == FIELDS


def test_where_files_are_kept(tmp_path, monkeypatch):
    monkeypatch.delenv(store.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.file_for(KEY).parent == tmp_path / "mlx-redrafter" / "tuning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(openblas.pathlib.Path, "home", lambda: tmp_path)
    for system, place in (("darwin", "Library/Caches"), ("linux", ".cache")):
        monkeypatch.setattr(openblas.sys, "platform", system)
        assert store.file_for(KEY).parent == tmp_path / place / "mlx-redrafter" / "tuning"
    monkeypatch.setenv(store.VARIABLE, "off")
    assert store.file_for(KEY) is None and store.write(KEY, FIELDS) is None and store.read(KEY) == {}
    monkeypatch.setenv(store.VARIABLE, "/proc/nope")
    assert store.write(KEY, FIELDS) is None and store.read(KEY) == {}
