"""KV caches on disk: they come back whole or not at all, and what is dropped is said."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
import urllib.request

import mlx.core as mx
import pytest
from support import filled, make_model
from support.commands import code_of
from support.serving import TINY, serving

from mlx_redrafter import UserError
from mlx_redrafter.server.caches.files import USES, CacheFiles

MODEL = "a" * 32


@pytest.fixture
def folder(tmp_path, small_model):
    """A directory with two caches of the small model."""
    files = CacheFiles(tmp_path / "caches", 10**9)
    files.write(MODEL, [1, 2, 3], filled(small_model, [1, 2, 3]), True)
    files.write(MODEL, [4, 5], filled(small_model, [4, 5]), True)
    files.close()
    return tmp_path / "caches"


def kept(folder, model, most=10**9):
    files = CacheFiles(folder, 10**9)
    try:
        return [(tokens, [c.state for c in cache]) for tokens, cache in files.read(model, MODEL, most)]
    finally:
        files.close()


def test_what_was_written_comes_back(folder, small_model):
    """If this fails, a text goes on from rows that are not its own."""
    found = kept(folder, small_model)
    assert [tokens for tokens, _ in found] == [[1, 2, 3], [4, 5]]
    for tokens, states in found:
        for state, cache in zip(states, filled(small_model, tokens)):
            assert all(mx.array_equal(mx.array(a), mx.array(b)) for a, b in zip(state, cache.state))
    assert folder.stat().st_mode & 0o77 == 0


def test_the_most_used_come_back(folder, small_model):
    """If this fails, a directory keeps what nobody needs, and drops what everybody does."""
    files = CacheFiles(folder, 10**9)
    list(files.read(small_model, MODEL, 10**9))
    files.use(MODEL, [1, 2])
    files.close()
    size = max(path.stat().st_size for path in folder.glob("*/*"))
    assert [tokens for tokens, _ in kept(folder, small_model, size)] == [[1, 2, 3]]
    files = CacheFiles(folder, 2 * size)
    files.write(MODEL, [7], filled(small_model, [7]), True)
    files.close()
    assert [tokens for tokens, _ in kept(folder, small_model)] == [[7], [1, 2, 3]]


def test_longer_ones_take_the_place_of_their_beginnings(folder, small_model):
    files = CacheFiles(folder, 10**9)
    list(files.read(small_model, MODEL, 10**9))
    files.use(MODEL, [1])
    files.write(MODEL, [1, 2, 3, 4], filled(small_model, [1, 2, 3, 4]), True)
    files.write(MODEL, [4, 5, 6], filled(small_model, [4, 5, 6]), False)
    files.close()
    assert [tokens for tokens, _ in kept(folder, small_model)] == [[4, 5], [4, 5, 6], [1, 2, 3, 4]]


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def half_written(path):
    path.rename(path.with_name(f".123.{'new.safetensors'}"))


@pytest.mark.parametrize(
    "damage, words",
    [
        (cut, "damaged: its content is not what was written"),
        (flip, "damaged: its content is not what was written"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (half_written, "its writing was not finished"),
    ],
)
def test_damage_is_dropped_and_said(folder, small_model, caplog, damage, words):
    """If this fails, a server goes on from garbage, or does not start."""
    [first, *_] = sorted(folder.glob("*/*"))
    damage(first)
    with caplog.at_level(logging.WARNING):
        assert len(kept(folder, small_model)) == 1
    assert words in caplog.text and len(list(folder.glob("*/*"))) == 1


def test_caches_of_another_model_are_not_for_this_one(folder, caplog):
    """If this fails, a model reads another's rows."""
    other = make_model(hidden=48)
    with caplog.at_level(logging.WARNING):
        assert kept(folder, other) == []
    assert "is of another model" in caplog.text


def test_uses_that_cannot_be_read_are_none(folder, small_model):
    (folder / USES).write_text("[")
    assert len(kept(folder, small_model)) == 2


def test_a_directory_is_one_servers(folder, tmp_path):
    files = CacheFiles(folder, 10**9)
    with pytest.raises(UserError, match="another server uses it"):
        CacheFiles(folder, 10**9)
    files.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--prompt-cache-dir .*file: cannot be written"):
        CacheFiles(tmp_path / "file", 10**9)


def test_a_disk_that_is_full_ends_nothing(folder, small_model, caplog, monkeypatch):
    def full(*_):
        raise RuntimeError("[write] Unable to write to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    files = CacheFiles(folder, 10**9)
    files.write(MODEL, [9], filled(small_model, [9]), True)
    assert "cannot be written" in caplog.text and len(files.kept) == 2
    files.close()


PROMPT = "Once upon a time, there was a little girl named Lily. She liked"


def asked(folder):
    with serving(*TINY, "--num-draft-tokens", "3", "--prompt-cache-dir", str(folder)) as client:
        return client.post("/v1/completions", prompt=PROMPT, max_tokens=12)


def cached(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_a_server_goes_on_where_the_last_one_ended(tmp_path):
    """If this fails, the first request after a start reads all of a long prompt again, or has another text."""
    first, second = asked(tmp_path), asked(tmp_path)
    assert cached(first) == 0 and cached(second) >= second["usage"]["prompt_tokens"] - 2
    assert first["choices"] == second["choices"]


WRITER = """
import sys, pathlib, mlx_redrafter, mlx.core as mx
from mlx_lm.models.cache import KVCache
from mlx_redrafter.server.caches.files import CacheFiles
files = CacheFiles(pathlib.Path(sys.argv[1]), 10**11)
cache = KVCache()
cache.update_and_fetch(*(mx.zeros((1, 8, 256, 16384)) for _ in range(2)))
for i in range(1000):
    files.write("b" * 32, [i], [cache], True)
"""


def killed_while_writing(folder):
    """Kills a process in the middle of a write of some hundred megabytes."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(folder)]) as process:
        end = time.monotonic() + 120
        while not any(path.stat().st_size for path in folder.glob("*/.*")):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    return [path for path in folder.glob("*/*") if path.name.endswith("new.safetensors")]


def test_killed_while_writing(folder, small_model, caplog):
    """If this fails, a server that was killed does not start again, or leaves its half-written files for ever."""
    left = killed_while_writing(folder)
    with caplog.at_level(logging.WARNING):
        assert [tokens for tokens, _ in kept(folder, small_model)] == [[1, 2, 3], [4, 5]]
    assert len(left) == 1 and f"dropped {'b' * 32}/{left[0].name}: its writing was not finished" in caplog.text
    assert not left[0].exists()


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.01 * n for n in range(20)])
def test_a_server_that_is_killed(tmp_path, delay):
    """If this fails, some moment in a server's life is a bad one to be killed in."""
    flags = [*TINY, "--num-draft-tokens", "3", "--prompt-cache-dir", str(tmp_path)]
    command = [sys.executable, "-m", "mlx_redrafter.cli.main", "serve", "--port", "0", *flags]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        url = process.stdout.readline().split()[-1]
        body = json.dumps({"prompt": PROMPT, "max_tokens": 12}).encode()
        urllib.request.urlopen(f"{url}/v1/completions", body).read()
        time.sleep(delay)
        process.kill()
    answer = asked(tmp_path)
    assert answer["choices"] == asked(tmp_path)["choices"]


def test_flags(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert code_of("serve", *TINY, "--port", "0", "--prompt-cache-dir", str(tmp_path / "file")) == 2
    assert "--prompt-cache-dir" in capsys.readouterr().err
