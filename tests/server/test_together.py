"""Several processes answer as one does, and go the same way whatever clients, clocks and errors do."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from mlx_redrafter.benchmarks.architectures import small_models
from support import several
from support.hybrids import write_pair
from support.serving import TINY, Client, serving, serving_together

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


def answered(client, begin, count):
    """Texts by how they were asked for, and how much of a second turn was cached."""

    def text(begin=begin, **fields):
        return client.post(TEXT, prompt=begin, max_tokens=count, **fields)["choices"][0]["text"]

    found = {"greedy": text(), "seeded": text(temperature=1.0, seed=7)}
    pieces = client.pieces(TEXT, prompt=begin, max_tokens=count, temperature=1.0, seed=7)
    found["streamed"] = "".join(piece["choices"][0]["text"] for piece in pieces)
    turn = client.post(TEXT, prompt=f"{begin} {found['greedy']}", max_tokens=count)
    found["second turn"] = turn["choices"][0]["text"]
    found["cached"] = turn["usage"]["prompt_tokens_details"]["cached_tokens"]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found["at once"] = list(pool.map(text, [begin + word for word in ("", " and", " the")]))
    return found


def begun(client, begin, sign=b"data", **fields):
    """A stream of a long text, of which the first line has come that begins with a sign."""
    connection = http.client.HTTPConnection(client.host, client.port, timeout=60)
    body = {"prompt": begin, "max_tokens": 400, "stream": True} | fields
    connection.request("POST", TEXT, json.dumps(body))
    answer = connection.getresponse()
    assert answer.status == 200
    while not answer.readline().startswith(sign):
        pass
    return connection, answer


def hang_up(client, **fields):
    connection, answer = begun(client, **fields)
    answer.close()
    connection.close()


def ends(running, victim):
    """What the processes say, and how they end, after one of them has gone."""
    running[victim].kill()
    said = "".join(process.communicate(timeout=15)[1] for process in running)
    errors = [line for line in several.ours(said) if "mlx-redrafter: error" in line]
    return errors, [p.returncode for p in running]


def test_two_processes_answer_as_one(tmp_path):
    """If this fails, a server on two Macs writes other texts, hangs when a client goes, or when a Mac does."""
    count, flags, begin = 16, (*TINY, "--num-draft-tokens", "3", "--log-level", "ERROR"), "Once upon a time"
    with serving(*flags) as one:
        expected, whole = answered(one, begin, count), one.post(TEXT, prompt=begin, max_tokens=300)
    with serving_together(tmp_path, 2, *flags) as (client, running):
        assert answered(client, begin, count) == expected
        assert expected["cached"] > count
        status, message = client.refusal(TEXT, {"prompt": begin, "model": "another"})
        assert (status, message) == (404, "2 processes serve tiny alone, and its drafter")
        hang_up(client, begin=begin)
        whole = client.post(TEXT, prompt=f"{begin} " + whole["choices"][0]["text"], max_tokens=1)
        assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] < 100
        begun(client, begin)
        assert ends(running, 1) == (
            ["mlx-redrafter: error: rank 1 of 2 is gone, it cannot go on"],
            [1, -signal.SIGKILL],
        )


@pytest.mark.slow
@pytest.mark.parametrize(("module", "flags"), [("llama", ()), ("qwen2", ("--pipeline",))])
def test_every_way_to_ask(tmp_path, monkeypatch, module, flags):
    """If this fails, requests of some kind part the processes: those that measure, are held to a form, or fail."""
    for key, value in several.WIDTHS.items():
        monkeypatch.setitem(small_models.CONFIGS["common"], key, value)
    flags, begin = (
        (*write_pair(module, tmp_path, monkeypatch), *flags, "--prefill-step-size", "32", "--log-level", "ERROR"),
        "import os",
    )
    form = {
        "prompt": begin,
        "max_tokens": 60,
        "response_format": {"type": "json_object"},
        "temperature": 1.0,
        "seed": 3,
    }
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object"}}}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    refused = [
        (TEXT, {"prompt": [99999]}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "tools": [tool]}),
        (CHAT, {"messages": [{"role": "user", "content": [image]}]}),
    ]
    with serving(*flags) as one:
        expected, structured = answered(one, begin, 40), one.post(TEXT, **form)["choices"]
        plain = one.post(TEXT, prompt=begin, max_tokens=40, draft_model="none", repetition_penalty=1.2)["choices"]
    with serving_together(tmp_path, 2, *flags) as (client, _):
        for path, body in refused:
            assert client.refusal(path, body)[0] == 400
        assert answered(client, begin, 40) == expected
        assert client.post(TEXT, **form)["choices"] == structured
        fields = {"draft_model": "none", "repetition_penalty": 1.2}
        assert client.post(TEXT, prompt=begin, max_tokens=40, **fields)["choices"] == plain
        reading = {"begin": begin * 100, "sign": b": keepalive"}
        for fields in ({}, {"num_draft_tokens": 3}, reading, reading | {"num_draft_tokens": 3}):
            hang_up(client, **{"begin": begin} | fields)
            assert client.post(TEXT, prompt=begin, max_tokens=40)["choices"][0]["text"] == expected["greedy"]
        busy = begun(client, begin, num_draft_tokens=3)
        late = http.client.HTTPConnection(client.host, client.port, timeout=60)
        late.request("POST", TEXT, json.dumps({"prompt": begin}))
        late.close()  # before its turn comes
        for one in busy:
            one.close()
        assert client.post(TEXT, prompt=begin, max_tokens=40)["choices"][0]["text"] == expected["greedy"]


def busy_seconds(running):
    """Of all cores, so far; whole seconds."""
    said = subprocess.run(
        ["ps", "-o", "time=", "-p", ",".join(str(process.pid) for process in running)], capture_output=True, text=True
    )
    return sum(int(part) * 60**i for line in said.stdout.split() for i, part in enumerate(reversed(line.split(":"))))


@pytest.mark.slow
def test_who_ends_first_ends_all(tmp_path):
    """If this fails, a server on several Macs cannot be ended, or keeps them busy while nobody asks."""
    with serving_together(tmp_path, 2, *TINY, "--num-draft-tokens", "3", "--log-level", "ERROR") as (client, running):
        client.post(TEXT, prompt="Once", max_tokens=3)
        before = busy_seconds(running)
        time.sleep(5)
        assert busy_seconds(running) - before <= 2  # of ten
        begun(client, "Once")
        for process in reversed(running):  # as a terminal does
            process.send_signal(signal.SIGINT)
        assert [process.wait(20) for process in running] == [0, 0]


@pytest.mark.slow
def test_mlx_launch(tmp_path):
    """If this fails, what the documentation says does not start a server, or Ctrl-C leaves a part of it behind."""
    command = [sys.executable, "-m", "mlx_redrafter.cli.main", "serve", "--port", "0", *TINY, "--num-draft-tokens", "3"]
    with several.launching(2, command) as launched:
        port = int(launched.stdout.readline().rpartition(":")[2])
        client = Client(("127.0.0.1", port))
        assert client.post(TEXT, prompt="Once upon a time", max_tokens=5)["usage"]["completion_tokens"] == 5
        os.killpg(launched.pid, signal.SIGINT)
        _, said = launched.communicate(timeout=30)
        assert "exited with code" not in said and "was killed" not in said and "mlx-redrafter: error" not in said
