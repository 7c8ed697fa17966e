"""A server that was asked two thousand things, half of them nonsense, is as it was."""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading

import pytest
from support import DATA
from support.memory import resident
from support.serving import TINY

FLAGS = [*TINY[:-2], "--max-body-bytes", "20K", "--max-queue", "8", "--prompt-cache-bytes", "3MB"]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WORDS = (DATA / "tiny" / "tokenizer.json").read_text()[2000:60000]
VALUES = [None, True, -1, 0.5, 10**30, "x", "\ud800", [], [{}], {"x": 0}]
NAMES = [
    "max_tokens",
    "temperature",
    "stop",
    "logit_bias",
    "seed",
    "messages",
    "prompt",
    "tools",
    "stream_options",
    "n",
]


class Soak:
    """Asks a server from several threads.

    Args:
        url: of the server.
    """

    def __init__(self, host: str, port: int):
        self.host, self.port = host, port
        self.counts = collections.Counter[str]()
        self.wrong = list[str]()
        self.lock = threading.Lock()

    def ask(self, chance: random.Random) -> None:
        """One request of some kind; what is wrong with its answer is noted."""
        kind = chance.choices(["good", "wrong", "broken", "huge", "gone"], [50, 20, 10, 5, 15])[0]
        path = chance.choice([CHAT, TEXT, "/v1/messages", "/v1/responses"])
        body = self.body(path, chance)
        if kind == "wrong":
            body[chance.choice(NAMES)] = chance.choice(VALUES)
        raw = json.dumps(body).encode()
        if kind == "broken":
            raw = chance.choice([raw[: len(raw) // 2], b"", b"\xff\xfe", b"[" * 9000, b"null", os.urandom(50)])
        if kind == "huge":
            raw = json.dumps(body | {"user": "x" * chance.choice([30_000, 3_000_000])}).encode()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=300)
        with contextlib.closing(connection):
            connection.request("POST", path, raw, {"Content-Type": "application/json"})
            if kind == "gone":
                connection.sock.settimeout(chance.choice([0.001, 0.05, 0.3]))
                with contextlib.suppress(OSError):
                    connection.sock.recv(chance.choice([1, 500, 5000]))
                self.note(kind, None)
                return
            answer = connection.getresponse()
            content = answer.read().decode()
        expected = {"good": (200, 429), "wrong": (200, 400, 429), "broken": (400,), "huge": (413,)}[kind]
        fine = answer.status in expected and self.well_formed(path, answer, content)
        self.note(f"{kind} {answer.status}", None if fine else f"{path} {raw[:300]!r}: {answer.status} {content[:500]}")

    def body(self, path, chance):
        at = chance.randrange(len(WORDS) - 1000)
        words = WORDS[at : at + chance.choice([5, 50, 300])]
        tokens = chance.choice([1, 5, 20, 60])
        body = {"stream": chance.random() < 0.4, "temperature": chance.choice([0, 0.7, 1.5])}
        if path == TEXT:
            return body | {"prompt": words, "max_tokens": tokens, "num_draft_tokens": chance.choice([0, 1, 4])}
        if path == "/v1/responses":
            return body | {"input": words, "max_output_tokens": tokens}
        body |= {"messages": [{"role": "user", "content": words}], "max_tokens": tokens}
        if path == CHAT:
            body |= {
                "stop": chance.choice(["\n", ["e", "a"], []]),
                "draft_model": chance.choice(["none", "tiny-drafter"]),
            }
        return body

    def well_formed(self, path, answer, content):
        if answer.headers["Content-type"] == "text/event-stream":
            last = {CHAT: "data: [DONE]", TEXT: "data: [DONE]", "/v1/messages": "message_stop"}.get(path, "response.")
            lines = [line for line in content.splitlines() if line.startswith("data: {")]
            return last in content[-3000:] and all(isinstance(json.loads(line[6:]), dict) for line in lines)
        fields = json.loads(content)
        return ("error" in fields and fields["error"]["message"]) if answer.status != 200 else fields["usage"]

    def note(self, what, wrong):
        with self.lock:
            self.counts[what] += 1
            if wrong:
                self.wrong.append(wrong)

    def run(self, count: int, seed: int) -> None:
        def work(number):
            chance = random.Random(f"{seed} {number}")
            for _ in range(count // 4):
                try:
                    self.ask(chance)
                except Exception as error:
                    self.note("error", f"{type(error).__name__}: {error}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_soak(tmp_path):
    """If this fails, a server that runs for days runs out of memory, threads or order."""
    command = [sys.executable, "-m", "mlx_redrafter.cli.main", "serve", "--port", "0", "--log-level", "ERROR", *FLAGS]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    log = (tmp_path / "log").open("w")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process:
        try:
            host, port = process.stdout.readline().split()[-1].removeprefix("http://").split(":")
            soak = Soak(host, int(port))
            soak.run(400, seed=1)
            before = resident(process.pid)
            soak.run(1600, seed=2)
            after = resident(process.pid)
            threads = len(list(pathlib.Path(f"/proc/{process.pid}/task").iterdir()))
            print(soak.counts, before, after, threads)
            assert soak.wrong == []
            assert sum(soak.counts.values()) == 2000 and soak.counts["good 200"] > 500
            assert after < 1.1 * before
            connection = http.client.HTTPConnection(host, int(port))
            connection.request("POST", TEXT, json.dumps({"prompt": "Once", "max_tokens": 3}))
            assert connection.getresponse().status == 200
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 0 and "Traceback" not in (tmp_path / "log").read_text()
