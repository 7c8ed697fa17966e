"""Our server and mlx_lm's, in this process behind real sockets."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import pathlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from typing import Any

import mlx_lm.server as theirs

from mlx_redrafter.cli import serve
from mlx_redrafter.server import seam
from mlx_redrafter.server.app import running
from support import DATA, several

TINY = ("--model", str(DATA / "tiny"), "--draft", str(DATA / "tiny-drafter"), "--dtype", "float32", "--lookup", "off")


class Client:
    """Asks a server.

    Args:
        server: one that is listening, or its host and port, where it is another process.
    """

    def __init__(self, server: ThreadingHTTPServer | tuple[str, int]):
        self.server = server
        host, port = server if isinstance(server, tuple) else server.server_address[:2]
        self.host, self.port = str(host), port
        self.url = f"http://{self.host}:{port}"

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content of an answer; a body that is not bytes goes as JSON."""
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request(method, path, raw, headers or {})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def post(self, path: str, **fields: Any) -> dict[str, Any]:
        """The fields of an answer to fields; it has to be one."""
        status, _, content = self.send("POST", path, fields)
        assert status == 200, content
        return json.loads(content)

    def refusal(self, path: str, body: Any) -> tuple[int, str]:
        """Status and message of an error, in the form that all errors have."""
        status, _, content = self.send("POST", path, body)
        answer = json.loads(content)
        assert answer["type"] == "error" and answer["error"].keys() == {"message", "type", "param", "code"}, answer
        return status, answer["error"]["message"]

    def pieces(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The chunks of a stream, which has to end well."""
        status, _, content = self.send("POST", path, fields | {"stream": True})
        lines = [line.removeprefix("data: ") for line in content.decode().splitlines() if line.startswith("data: ")]
        assert status == 200 and lines[-1] == "[DONE]", content
        return [json.loads(line) for line in lines[:-1]]


def parsed(*flags: str) -> argparse.Namespace:
    """The flags of `serve`, at a free port."""
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return serve.prepare(parser.parse_args(["--port", "0", *flags]))


def wait(condition: Callable[[], Any], seconds: float) -> None:
    """Until a condition holds, which has to be within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[Client]:
    """Our server with these flags."""
    seam.install()
    with running(parsed(*flags)) as server:
        yield Client(server)


@contextlib.contextmanager
def serving_together(
    folder: pathlib.Path, size: int, *flags: str
) -> Iterator[tuple[Client, list[subprocess.Popen[str]]]]:
    """Our server with these flags in so many processes, which share the model."""
    running = several.started(folder, [["serve", "--port", "0", *flags]] * size)
    try:
        assert running[0].stdout is not None and running[0].stderr is not None
        said = running[0].stdout.readline()
        assert said.startswith("Serving"), running[0].stderr.read()
        host, _, port = said.split()[-1].removeprefix("http://").rpartition(":")
        yield Client((host, int(port))), running
    finally:
        for process in running:
            process.kill()
            process.communicate()


@contextlib.contextmanager
def mlx_lm_serving(*flags: str) -> Iterator[Client]:
    """mlx_lm's with the same flags."""
    args = parsed(*flags)
    args.allowed_origins, args.draft_model = "*", args.draft
    args.decode_concurrency, args.prompt_concurrency = 4, 4
    generator = theirs.ResponseGenerator(theirs.ModelProvider(args), theirs.LRUPromptCache())
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *a, **k: theirs.APIHandler(generator, *a, system_fingerprint="x", **k)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Client(server)
    finally:
        server.shutdown()
        server.server_close()
        generator.stop_and_join()
