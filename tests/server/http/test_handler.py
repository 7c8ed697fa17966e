"""Who may ask what, and how it is refused."""

from __future__ import annotations

import json
import re
import socket

import pytest
from support.serving import serving, wait

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
ASK = {"prompt": "<greet>", "max_tokens": 1}


@pytest.fixture(scope="module")
def guarded(parrot_flags):
    """A client of a server with a key, one allowed origin and small limits."""
    limits = ("--max-body-bytes", "2K", "--max-context", "20", "--most-max-tokens", "10", "--max-tokens", "30")
    with serving(*parrot_flags, *limits, "--api-key", "schlüssel", "--allowed-origins", "http://ui.example") as client:
        yield client


KEY = {"x-api-key": "schlüssel".encode().decode("latin-1")}


def test_the_key(guarded):
    """If this fails, strangers are served, or those who know the key are not."""
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"x-api-key": "schl\xfcssel"}):
        status, answer, _ = guarded.send("POST", TEXT, ASK, headers | {"Origin": "http://ui.example"})
        assert status == 401 and answer["Access-Control-Allow-Origin"] == "http://ui.example"
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
        assert guarded.send("GET", path)[0] == 401
    for headers in ({"Authorization": f"Bearer {KEY['x-api-key']}"}, KEY):
        assert guarded.send("POST", TEXT, ASK, headers)[0] == 200
    assert guarded.send("GET", "/health")[0] == 200


def test_limits(guarded):
    """If this fails, one client can take what all have to share."""

    def asked(body):
        status, _, content = guarded.send("POST", TEXT, body, KEY)
        return status, json.loads(content).get("error", {}).get("message")

    assert asked(ASK | {"user": "x" * 2000})[0] == 413
    assert asked(ASK | {"max_tokens": 11}) == (400, "max_tokens is 11, expected at most 10")
    assert asked({"prompt": "<greet>" * 20}) == (400, "the prompt has 20 tokens, expected fewer than the context of 20")
    answer = guarded.send("POST", TEXT, {"prompt": "<long>"}, KEY)[2]
    assert json.loads(answer)["usage"]["completion_tokens"] == 10
    answer = guarded.send("POST", TEXT, {"prompt": "<greet>" * 14 + "<long>"}, KEY)[2]
    assert json.loads(answer)["usage"]["completion_tokens"] == 5


def test_an_oversized_body_is_read_before_it_is_refused(guarded):
    """If this fails, a client that sends much before it reads gets a broken connection in the place of an answer."""
    status, _, content = guarded.send("POST", TEXT, b"x" * 3_000_000, KEY)
    assert status == 413 and "has 3000000 bytes, expected at most 2000" in content.decode()
    assert guarded.send("POST", TEXT, b"x" * 3_000_000)[0] == 401
    assert guarded.send("POST", "/v1/nowhere", b"x" * 3_000_000, KEY)[0] == 404


def test_origins(guarded, told):
    """If this fails, any web page can use the server of whoever looks at it."""
    preflight = {"Origin": "http://ui.example", "Access-Control-Request-Headers": "authorization,content-type"}
    status, headers, _ = guarded.send("OPTIONS", CHAT, None, preflight)
    assert status == 204 and headers["Access-Control-Allow-Headers"] == "authorization,content-type"
    for client in (guarded, told):
        for method, body in (("OPTIONS", None), ("POST", ASK), ("GET", None)):
            status, headers, _ = client.send(method, TEXT, body, {"Origin": "http://evil.example"})
            assert status == 403 and "Access-Control-Allow-Origin" not in headers
    assert "Access-Control-Allow-Origin" not in told.send("POST", TEXT, ASK)[1]


@pytest.mark.parametrize(
    "method, path, body, status",
    [
        ("POST", "/v1/nowhere", {}, 404),
        ("GET", "/v1/nowhere", None, 404),
        ("GET", "/v1/models/nowhere", None, 404),
        ("GET", TEXT, None, 404),
        ("PUT", TEXT, {}, 501),
        ("POST", TEXT, b"{", 400),
        ("POST", TEXT, b"\xff", 400),
        ("POST", TEXT, b"[" * 100_000, 400),
        ("POST", TEXT, b"[]", 400),
        ("POST", TEXT, b'{"prompt": "x", "temperature": NaN}', 400),
        ("POST", TEXT, b'{"prompt": "x", "temperature": 1e999}', 400),
        ("POST", TEXT, {"prompt": "<greet>", "model": "nowhere"}, 404),
        ("POST", TEXT, {"prompt": "<greet>", "model": "\u0000"}, 404),
        ("POST", TEXT, {"prompt": "<greet>", "draft_model": "/nowhere/at/all"}, 404),
        ("POST", TEXT, {"prompt": "<greet>", "adapters": "/nowhere/at/all"}, 404),
    ],
)
def test_refusals(told, method, path, body, status):
    """If this fails, a client gets no answer, one that it cannot read, or one that is not its mistake."""
    found, headers, content = told.send(method, path, body)
    assert found == status
    error = json.loads(content)["error"]
    assert headers["Content-type"] == "application/json" and error["message"] and "\n" not in error["message"]
    assert not re.search(r"/\w+/\w+", error["message"].replace(path, "")), error
    assert told.post(TEXT, **ASK)["choices"][0]["text"] == "Hel"


@pytest.mark.parametrize(
    "sent, status",
    [
        (b"POST /v1/completions HTTP/1.1\r\n\r\n", 411),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_no_request(told, sent, status):
    with socket.create_connection((told.host, told.port)) as connection:
        connection.sendall(sent)
        answer = connection.makefile("rb").read()
    assert f" {status} ".encode() in answer.partition(b"\r\n")[0]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["type"] == "error"


def test_models(told):
    """If this fails, a client cannot learn what to ask for, or learns where it lies."""
    [first, *_] = json.loads(told.send("GET", "/v1/models")[2])["data"]
    assert first["id"] == "parrot" and json.loads(told.send("GET", "/v1/models/parrot?x=1")[2]) == first
    assert told.post(TEXT, **ASK, model="parrot")["model"] == told.post(TEXT, **ASK)["model"] == "parrot"


def test_null_counts_as_left_out(told):
    assert told.post(TEXT, **ASK, temperature=None, stop=None, stream=None, tools=None, seed=None)["choices"]


def test_tools_are_unknown_to_a_text(told):
    """If this fails, a field that means nothing here is an error of the server."""
    assert told.post(TEXT, **ASK, tools=5, tool_choice=[])["usage"] == told.post(TEXT, **ASK)["usage"]


def test_figures(served):
    """If this fails, an answer does not say how it was made."""
    fields = {"prompt": "Once upon a time", "max_tokens": 30}
    answer = served.post(TEXT, **fields)
    usage, timings = answer["usage"], answer["timings"]
    assert 0 < usage["accepted_tokens"] < usage["draft_tokens"] and usage["mean_acceptance_length"] > 1
    assert (timings["draft_n"], timings["method"], timings["shape"]) == (
        usage["draft_tokens"],
        "redrafter",
        "chain of 3",
    )
    assert timings["predicted_n"] == 30 and timings["predicted_per_second"] > 0
    *pieces, last = served.pieces(TEXT, **fields, stream_options={"include_usage": True})
    assert pieces[-1]["timings"]["draft_n"] == usage["draft_tokens"] and "timings" not in pieces[0]
    assert last["choices"] == [] and last["object"] == "text_completion"
    assert last["usage"] | {"prompt_tokens_details": 0} == usage | {"prompt_tokens_details": 0}
    plain = served.post(TEXT, **fields, num_draft_tokens=0)
    assert plain["timings"]["method"] == "plain" and plain["usage"]["draft_tokens"] == 0
    assert plain["choices"] == answer["choices"]


def test_metrics(served):
    """If this fails, who watches the server sees nothing, or something else than happens."""

    def figures():
        lines = served.send("GET", "/metrics")[2].decode().splitlines()
        return {name: float(n) for name, n in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}

    before = figures()
    usage = served.post(TEXT, prompt="Once upon a time", max_tokens=20)["usage"]
    served.refusal(TEXT, {})
    served.refusal("/any/path/at/all", {})
    answers = (
        'path="/v1/completions",status="200"',
        'path="/v1/completions",status="400"',
        'path="other",status="404"',
    )
    names = [f"mlx_redrafter_requests_total{{{answer}}}" for answer in answers]
    wait(lambda: all(figures().get(name, 0) > before.get(name, 0) for name in names), 10)  # counted once they are given
    now = figures()

    def more(name):
        return now[f"mlx_redrafter_{name}"] - before.get(f"mlx_redrafter_{name}", 0)

    assert more('requests_total{path="/v1/completions",status="200"}') == 1
    assert more('requests_total{path="/v1/completions",status="400"}') == 1
    assert more('requests_total{path="other",status="404"}') == 1
    assert more("generated_tokens_total") == 20 and more("prompt_tokens_total") == usage["prompt_tokens"]
    assert more("cached_prompt_tokens_total") == usage["prompt_tokens_details"]["cached_tokens"]
    assert more("draft_tokens_total") == usage["draft_tokens"]
    assert more("accepted_tokens_total") == usage["accepted_tokens"]
    assert more("request_seconds_count") == 1 and now["mlx_redrafter_waiting_requests"] == 0
    assert now["mlx_redrafter_prompt_cache_bytes"] > 0 and now["mlx_redrafter_prompt_cache_sequences"] > 0
