"""What `--record-sessions` writes, and where; without it nothing is written."""

import os
import stat

import pytest
from support.commands import code_of
from support.serving import TINY, serving

from mlx_redrafter.text.sessions import files
from mlx_redrafter.text.sessions.recorder import Recorder, settings_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def typed(*lines):
    """Stands for `input`."""
    rest = iter(lines)
    return lambda prompt: next(rest)


def records():
    return [record for path in files.files() for record in files.read(path)]


def test_nothing_is_kept_unless_asked_for(cache, capsys):
    """If this fails, questions are kept of people who did not allow it."""
    assert code_of("generate", "-p", "import os", "-m", "8") == 0
    with serving(*TINY) as client:
        client.post("/v1/completions", prompt="Once upon a time", max_tokens=4)
    assert not files.folder().exists()
    assert code_of("sessions") == 0 and "nothing is recorded" in capsys.readouterr().out


def test_commands_record(cache, monkeypatch, capsys):
    """If this fails, what was asked is not kept whole, or others on the machine can read it."""
    monkeypatch.setattr("builtins.input", typed("import os", "import re", "q"))
    assert code_of("chat", "-m", "8", "--record-sessions") == 0
    assert code_of("generate", "-p", "def f(x):", "-m", "8", "--temp", "0.5", "--top-k", "3", "--record-sessions") == 0
    path = files.files()[-1]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    first, second, third = records()
    assert [message["role"] for message in second["messages"]] == ["user", "assistant"] * 2
    assert second["messages"][:2] == first["messages"] and first["messages"][0]["content"] == "import os"
    assert third["prompt"] == "def f(x):" and third["settings"] == {"temp": 0.5, "top_k": 3}
    assert first["settings"] == {"temp": 0.0} and first["ended"] is False and first["target"]["num_layers"] > 0
    capsys.readouterr()
    with path.open("ab") as file:
        file.write(b'{"prompt": "cut')  # a disk was full
    assert code_of("sessions") == 0 and path.name in capsys.readouterr().out
    assert code_of("sessions", "--show") == 0 and f"def f(x):{third['completion']}" in capsys.readouterr().out
    assert code_of("sessions", "--delete") == 0 and "files deleted" in capsys.readouterr().out
    assert not files.files()
    assert code_of("generate", "-p", "x", "--record-sessions", "--prompt-cache-file", "x") == 2


def test_the_server_records(cache):
    """If this fails, requests are not kept, or not as they were."""
    with serving(*TINY, "--record-sessions") as client:
        said = client.post("/v1/completions", prompt="Once upon a time", max_tokens=6)["choices"][0]["text"]
        client.pieces("/v1/completions", prompt="There was", max_tokens=6, stop=["zzz"], top_p=0.5, temperature=1.0)
    first, second = records()
    assert (first["prompt"], first["completion"], first["settings"]) == ("Once upon a time", said, {"temp": 0.0})
    assert second["settings"] == {"temp": 1.0, "top_p": 0.5} and not second["ended"]


@pytest.mark.parametrize("line", ['{"target": "x"}', '{"time": "x"}', '{"messages": ["a"]}', "[]", '{"prompt": "half'])
def test_odd_lines_are_left_out(cache, capsys, line):
    """If this fails, one line hides all sessions."""
    files.folder().mkdir(parents=True)
    (files.folder() / "a.jsonl").write_text(f'{line}\n{{"prompt": "whole", "completion": " and well"}}\n')
    assert code_of("sessions") == 0 and code_of("sessions", "--show") == 0
    assert "whole and well" in capsys.readouterr().out


def test_a_disk_that_takes_half_a_line(cache, monkeypatch, pair):
    """If this fails, a full disk costs the record behind, too."""
    recorder, whole = Recorder(), os.write
    recorder.note(pair[0], pair[2], "m", "a", "b", {}, True)
    monkeypatch.setattr(os, "write", lambda file, line: whole(file, line[: len(line) // 2]))
    recorder.note(pair[0], pair[2], "m", "lost", "b", {}, True)
    monkeypatch.setattr(os, "write", whole)
    recorder.note(pair[0], pair[2], "m", "c", "d", {}, True)
    assert [record["prompt"] for record in records()] == ["a", "c"]


def test_settings_name_what_is_not_usual():
    usual = settings_of(0.7, {"stop": None}, top_p=1, min_p=0.0, top_k=0, xtc_probability=0.0, xtc_threshold=0.1)
    assert usual == {"temp": 0.7}
    assert settings_of(0, {"stop": ["x"]}, min_p=0.1) == {"temp": 0, "min_p": 0.1, "stop": ["x"]}


def test_a_place_that_cannot_be_written(cache, capsys):
    """If this fails, one who wants sessions kept learns at the end that they were not."""
    cache.write_text("a file")
    assert code_of("generate", "-p", "x", "--record-sessions") == 2
    assert "--record-sessions" in capsys.readouterr().err
