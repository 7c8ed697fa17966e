"""Rows on disk: what comes back, going on after a stop, and what is refused."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer
from support import make_model

from mlx_redrafter import UserError
from mlx_redrafter.system.files import write_json
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.loading import EMBEDDED
from mlx_redrafter.training.text import shards
from mlx_redrafter.training.text.shards import Recipe, Rows, Shard, shard_of, write_rows
from mlx_redrafter.training.text.sources import DataPlan, prepare


class Stop(Exception):
    pass


def recipe(stop_at=None, made=None, limit=None, **settings):
    """Three shards of 4, 3 and 5 rows, and 2 held-out rows; row i of shard k begins with 100 k + i."""

    def make(k, progress):
        if k == stop_at:
            raise Stop
        if made is not None:
            made.append(k)
        count = (4, 3, 5, 2)[k]
        tokens = 100 * k + np.arange(count)[:, None] + np.arange(6)
        return Shard(tokens.astype(np.int32), tokens % 2 == 0, {"odd": k})

    return Recipe({"seed": 1, **settings}, 6, 3, make, held_out=True, limit=limit)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_rows_come_back(tmp_path, monkeypatch):
    """If this fails, a drafter learns from other tokens than those that were written."""
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)  # fewer than there are
    rows = write_rows(tmp_path, recipe())
    assert (len(rows), rows.held_out, rows.length) == (14, 2, 6)
    tokens, counts = rows[np.array([13, 0, 4, 7, 3, 6, -1])]
    assert tokens[:, 0].tolist() == [301, 0, 100, 200, 3, 102, 301]
    assert (tokens == tokens[:, :1] + np.arange(6)).all() and (counts == (tokens % 2 == 0)).all()
    assert tokens.dtype == np.int32 and counts.dtype == bool and tokens.shape == counts.shape == (7, 6)
    assert rows[2:5][0][:, 0].tolist() == [2, 3, 100]
    assert len(rows[[]][0]) == 0
    for wrong in ([14], [-15]):
        with pytest.raises(IndexError):
            rows[wrong]
    assert isinstance(rows._open(0), np.memmap)
    assert rows.manifests[0]["shards"][1]["odd"] == 1 and rows.manifests[0]["shards"][0]["learned"] == 12


def test_padding_and_first_tokens_never_count():
    shard = shard_of([([5, 6, 7], np.ones(3, bool)), ([8, 9], np.array([True, False]))], 4)
    assert shard.tokens.tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]]
    assert shard.counts.tolist() == [[False, True, True, False], [False] * 4]


def test_going_on_after_a_stop(tmp_path):
    """If this fails, a stopped run writes its text anew, or ends with another one."""
    quiet, stopped, made = tmp_path / "quiet", tmp_path / "stopped", []
    write_rows(quiet, recipe())
    with pytest.raises(Stop):
        write_rows(stopped, recipe(stop_at=2))
    assert [s["complete"] for s in json.loads((stopped / "manifest.json").read_text())["shards"]] == [
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(UserError, match="not all written; run the same command again"):
        Rows(stopped)
    (stopped / ".123.shard-00002.npy").write_bytes(b"half")
    write_rows(stopped, recipe(made=made))
    assert made == [2, 3] and contents(stopped) == contents(quiet)
    (stopped / "shard-00001.npy").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"shard-00001.npy: missing or truncated"):
        Rows(stopped)
    write_rows(stopped, recipe(made=made))
    assert made == [2, 3, 1] and contents(stopped) == contents(quiet)


def test_shards_that_cannot_be_read(tmp_path, monkeypatch):
    """If this fails, rows of somebody else's, or damaged ones, end in a traceback in mid-training."""
    rows = write_rows(tmp_path, recipe())
    (tmp_path / "shard-00000.npy").write_bytes(b"x" * (tmp_path / "shard-00000.npy").stat().st_size)
    with pytest.raises(UserError, match=r"shard-00000.npy: cannot be read"):
        rows[[0]]

    def denied(path, mmap_mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(np, "load", denied)
    with pytest.raises(UserError, match=r"shard-00001.npy: cannot be read \(.*Permission denied"):
        rows[[4]]


def test_other_settings_are_refused(tmp_path):
    files = [{"path": "a.txt", "sha256": "1"}, {"path": "b.txt", "sha256": "2"}]
    write_rows(tmp_path, recipe(temps=[0.0, 1.0], files=files))
    before = contents(tmp_path)
    for settings, message in (
        ({"temps": [0.5], "files": files}, r"--temps is \[0.5\], but its rows were begun with \[0.0, 1.0\]"),
        ({"temps": [0.0, 1.0], "files": [files[0], files[1] | {"sha256": "3"}]}, "b.txt changed since"),
        ({"temps": [0.0, 1.0], "files": files[:1]}, "b.txt is gone since"),
        ({"temps": [0.0, 1.0], "files": files[::-1]}, "the files were given in another order"),
        ({"temps": [0.0, 1.0], "files": files, "rows": 3}, "--rows is 3, but its rows were begun with None"),
    ):
        with pytest.raises(UserError, match=message):
            write_rows(tmp_path, recipe(**settings))
    assert contents(tmp_path) == before
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="expected a manifest of format 1, found 99"):
        write_rows(tmp_path, recipe())


def test_a_limit_cuts_training_rows_only(tmp_path):
    rows = write_rows(tmp_path, recipe(limit=5))
    assert (len(rows), rows.held_out) == (7, 2)
    assert rows[:][0][:, 0].tolist() == [0, 1, 2, 3, 100, 300, 301]


def test_nothing_to_learn(tmp_path):
    nothing = Recipe({}, 6, 1, lambda k, progress: shard_of([([1, 2], np.zeros(2, bool))], 6), held_out=False)
    with pytest.raises(UserError, match="no row has a token to learn"):
        write_rows(tmp_path, nothing)


def test_full_disk(tmp_path):
    """If this fails, a full disk ends in a traceback or leaves a folder that cannot go on."""
    big = Recipe({}, 6, 1, lambda k, progress: Shard(np.ones((9999, 6), np.int32), np.ones((9999, 6), bool)), False)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, usual[1]))
    try:
        with pytest.raises(UserError, match=r"shard-00000.npy: cannot be written \(File too large\)"):
            write_rows(tmp_path, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert list(tmp_path.iterdir()) == []
    assert len(write_rows(tmp_path, big)) == 9999


def write_text(folder, kill_at=None):
    """A small model writes 5 shards and the held-out rows; kill -9 hits as the n-th file is put in place."""
    target, tokenizer = Target(make_model(vocab=4096)), load_tokenizer(EMBEDDED / "target")
    plan = DataPlan(rows=44, length=20, held_out=4, temps=(0.0, 1.0), batch_size=8, rows_per_shard=8)
    real, calls = os.replace, []

    def replace(*names):
        calls.append(names)
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        prepare(folder, target, tokenizer, plan)


HERE = pathlib.Path(__file__).parent
WRITES = f"import sys; sys.path[:0] = [{str(HERE)!r}, {str(HERE.parents[1])!r}]; from test_shards import write_text; "
WRITES += "write_text(sys.argv[1], int(sys.argv[2]))"


def check_killed(tmp_path, kills):
    """Writes quietly once, and once with kills, each at a file further on."""
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    write_text(quiet)
    for kill_at in kills:
        done = subprocess.run([sys.executable, "-c", WRITES, str(killed), str(kill_at)], stderr=subprocess.PIPE)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert [path for path in killed.iterdir() if path.name.startswith(".")]
    write_text(killed)
    assert contents(quiet) == contents(killed) and len(contents(quiet)) == 7


def test_killed_runs_end_as_quiet_ones(tmp_path):
    """If this fails, kill -9 leaves a folder that cannot go on, or other text."""
    check_killed(tmp_path, [5])


@pytest.mark.slow
def test_killed_at_every_file(tmp_path):
    check_killed(tmp_path, [1, 2, 3, 4, 3, 2, 1])


def test_several_folders(tmp_path):
    """If this fails, rows of two runs cannot be learned together, or held-out rows are learned."""
    for name in ("a", "b"):
        write_rows(tmp_path / name, recipe())
    one, both = Rows(tmp_path / "a"), Rows(tmp_path / "a", tmp_path / "b")
    assert (len(both), both.held_out, both.length) == (28, 4, 6)
    assert (both[:24][0] == np.concatenate([one[:12][0]] * 2)).all()
    assert (both[24:][0] == np.concatenate([one[12:][0]] * 2)).all()
    shorter = tmp_path / "b" / "manifest.json"
    write_json(shorter, json.loads(shorter.read_text()) | {"length": 5})
    with pytest.raises(UserError, match="b: rows of 5 tokens beside others of 6"):
        Rows(tmp_path / "a", tmp_path / "b")
