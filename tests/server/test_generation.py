"""What ends mlx_lm's generation thread, or goes unnoticed there, does not here (see docs/serving.md)."""

from __future__ import annotations

import functools
import http.client
import json
import threading

import pytest
from support.serving import serving
from support.serving import wait as wait_for

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"


def test_a_prompt_that_is_cached_whole(told):
    """If this fails, the second of two equal requests ends the server."""
    first = told.post(TEXT, prompt="<greet>", max_tokens=1)["choices"][0]["text"]
    again = told.post(TEXT, prompt="<greet>" + first, max_tokens=3)
    assert again["choices"][0]["text"] == "lo world, good bye"
    assert told.post(TEXT, prompt="<greet>" + first, max_tokens=3)["choices"] == again["choices"]


@pytest.mark.parametrize("prompt", [["<greet>"], [257], [[257]]])
def test_prompts_as_lists(told, prompt):
    """If this fails, a client that sends a list ends the server, or gets another text."""
    assert told.post(TEXT, prompt=prompt)["choices"][0]["text"] == "Hello world, good bye now"


@pytest.mark.parametrize("prompt", [["a", "b"], [], [[]], "", 5, [1.5], [99999], None])
def test_prompts_that_are_none(told, prompt):
    status, message = told.refusal(TEXT, {"prompt": prompt})
    assert status == 400 and "prompt" in message
    assert told.send("GET", "/health")[0] == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "stop, text, tokens, reason",
    [
        ("world", "Hello ", 3, "stop"),  # begins in one token and ends in the next
        (["x", "o wor"], "Hell", 2, "stop"),
        (" bye now!", "Hello world, good bye now", 6, "stop"),  # the text ends before it is whole
        ("", "Hello world, good bye now", 6, "stop"),
    ],
)
def test_stop_strings_end_the_text(told, stop, text, tokens, reason, stream):
    """If this fails, generation runs on behind a stop string, or takes away what only looked like one."""
    fields = {"prompt": "<greet>", "max_tokens": 20, "stop": stop}
    if not stream:
        answer = told.post(TEXT, **fields)
        found = [answer["choices"][0]["text"]]
    else:
        *pieces, answer = told.pieces(TEXT, **fields, stream_options={"include_usage": True})
        found = [piece["choices"][0]["text"] for piece in pieces]
        assert pieces[-1]["choices"][0]["finish_reason"] == reason
    assert "".join(found) == text
    assert answer["usage"]["completion_tokens"] == tokens


def test_whole_numbers_for_xtc(told):
    assert (
        told.post(TEXT, prompt="<greet>", xtc_probability=0, xtc_threshold=0)["choices"][0]["finish_reason"] == "stop"
    )


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"n": 2}, "n: 2 is greater than the maximum of 1"),
        ({"response_format": {"type": "xml"}}, "response_format.type: 'xml' is not one of"),
        ({"tool_choice": "required"}, "tool_choice: the tool is not among tools"),
    ],
)
def test_what_cannot_be_had_is_refused(told, fields, words):
    """If this fails, a client that asks for it gets something else in silence."""
    status, message = told.refusal(CHAT, {"messages": [{"role": "user", "content": "<greet>"}]} | fields)
    assert status == 400 and message.startswith(words)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png;base64,"}]}]},
        {"messages": [{"role": "user", "content": "<greet>"}], "chat_template_kwargs": {"chat_template": "x"}},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "user", "content": "<greet>" * 600}]},
        {"messages": [{"role": "user", "content": "<greet>"}], "logit_bias": {"99999": 1}},
        {"messages": [{"role": "user"}], "tools": [{"type": "function", "function": {}}]},
    ],
    ids=lambda fields: str(fields)[:60],
)
def test_what_only_the_model_can_tell(told, fields):
    """If this fails, a mistake of one client is an error of the server, or the end of it."""
    status, _ = told.refusal(CHAT, fields)
    assert status == 400
    assert told.post(TEXT, prompt="<greet>", max_tokens=1)["choices"][0]["text"] == "Hel"


def test_an_error_ends_its_request_only(told, monkeypatch):
    """If this fails, one request's error is the end of all."""

    def broken(*_):
        raise ZeroDivisionError("of the test")

    generator = told.server.RequestHandlerClass.args[0]
    with monkeypatch.context() as patch:
        patch.setattr(generator.model_provider, "shape_for", broken)
        status, message = told.refusal(TEXT, {"prompt": "<greet>"})
        assert (status, message) == (500, "ZeroDivisionError: of the test")
        with monkeypatch.context() as within:  # outside of what mlx_lm watches over
            within.setattr(generator, "_is_batchable", broken)
            assert told.refusal(TEXT, {"prompt": "<greet>"})[0] == 500
    assert told.post(TEXT, prompt="<greet>", max_tokens=1)["choices"][0]["text"] == "Hel"


def slow(client, requests=1):
    """A request whose tokens come slowly, sent and not yet answered."""
    generator = client.server.RequestHandlerClass.args[0]
    connection = http.client.HTTPConnection(client.host, client.port, timeout=60)
    body = {"prompt": "<long>", "max_tokens": 390, "repetition_penalty": 1.01}
    connection.request("POST", TEXT, json.dumps(body))
    wait(lambda: sum(request.begun.is_set() and bool(request.last) for request in list(generator._open)) == requests)
    return connection


wait = functools.partial(wait_for, seconds=30)


def test_a_client_that_hangs_up_is_noticed(told):
    """If this fails, the server goes on writing a text that nobody reads, and the others wait."""
    generator = told.server.RequestHandlerClass.args[0]
    connection = slow(told)
    [request] = generator._open
    connection.close()
    wait(lambda: not generator._open)
    wait(lambda: told.post(TEXT, prompt="<greet>", max_tokens=1))
    assert request.last.generation_tokens < 390


@pytest.mark.parametrize("at_once", [1, 2])
def test_the_queue_has_an_end(parrot_flags, at_once):
    """If this fails, requests pile up without bound, or wait for ever."""
    limits = ("--decode-concurrency", str(at_once), "--max-queue", "1", "--queue-seconds", "0.3")
    with serving(*parrot_flags, *limits) as client:
        busy = [slow(client, n + 1) for n in range(at_once)]
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(client.send("POST", TEXT, {"prompt": "<greet>"})))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one in busy:
            one.close()
        assert sorted(status for status, _, _ in answers) == [429, 429, 503]
        assert all("Retry-After" in headers for _, headers, _ in answers)
        wait(lambda: client.send("POST", TEXT, {"prompt": "<greet>", "max_tokens": 1})[0] == 200)
