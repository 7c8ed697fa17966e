"""Requests that are answered together get the texts that they get alone."""

from __future__ import annotations

import functools
import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from support.hybrids import write_pair
from support.serving import TINY, serving
from support.serving import wait as wait_for

from mlx_redrafter.decoding.batch import Batch
from mlx_redrafter.server.batches import row
from mlx_redrafter.server.caches.memory import PromptCaches

TEXT = "/v1/completions"
STORIES = ["Once upon a time", "Tom had a ball.", "One day, a cat", "Lily was sad. The", "The sun was hot and", "A dog"]
KINDS = [
    {"temperature": 0},
    {"temperature": 0.9, "seed": 7, "top_p": 0.95},
    {"temperature": 0, "stop": ["the", "zzz"]},
    {"temperature": 0.7, "seed": 3, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    {"temperature": 0, "logprobs": True, "top_logprobs": 2},
    {"temperature": 1.1, "seed": 5, "xtc_probability": 0.3, "max_tokens": 1},
]
REQUESTS = [{"prompt": story, "max_tokens": 20 + 9 * i, **KINDS[i]} for i, story in enumerate(STORIES)]


@pytest.fixture(scope="module")
def client():
    with serving(*TINY, "--num-draft-tokens", "3", "--prompt-cache-size", "20") as client:
        yield client


@pytest.fixture
def sizes(monkeypatch):
    """How many texts every step of the engine was for."""
    found, step = [], Batch.step

    def counted(self):
        found.append(len(self))
        return step(self)

    monkeypatch.setattr(Batch, "step", counted)
    return found


def together(client, requests, gap=0.0):
    """The answers to requests that come one shortly after the other."""
    with ThreadPoolExecutor(len(requests)) as pool:
        waiting = []
        for request in requests:
            waiting.append(pool.submit(client.post, TEXT, **request))
            time.sleep(gap)
        return [one.result() for one in waiting]


def generation_of(client):
    return client.server.RequestHandlerClass.args[0]


wait = functools.partial(wait_for, seconds=20)


def told(answer):
    """What does not depend on how fast it was, or on what was cached."""
    choice, usage = answer["choices"][0], answer["usage"]
    rows = (choice.get("logprobs") or {"content": []})["content"]
    tokens = [(one["token"], [top["id"] for top in one["top_logprobs"]]) for one in rows]
    return choice["text"], choice["finish_reason"], choice.get("stop_reason"), usage["completion_tokens"], tokens


@pytest.mark.parametrize("gap", [0.0, 0.05])
def test_texts_are_those_of_requests_alone(client, sizes, gap):
    """If this fails, a text depends on who else asks."""
    alone = [told(client.post(TEXT, **request)) for request in REQUESTS]
    assert not sizes  # the loop for one text wrote them
    found = together(client, REQUESTS * 2, gap)
    assert [told(answer) for answer in found] == alone * 2
    assert max(sizes) > 1
    usage, timings = found[0]["usage"], found[0]["timings"]
    assert usage["draft_tokens"] > usage["accepted_tokens"] > 0 and usage["mean_acceptance_length"] > 1
    assert timings["predicted_per_second"] > 0 and timings["prompt_per_second"] > 0
    assert timings["method"] == "redrafter" and timings["draft_n"] == usage["draft_tokens"]


def test_lookup_alone(sizes):
    """If this fails, a server without a drafter looks nothing up where several ask, or says something else then."""
    requests = [{"prompt": f"{story} {story} {story}", "max_tokens": 30, "temperature": 0} for story in STORIES[:3]]
    with serving(*TINY[:2], "--draft", "none", "--dtype", "float32", "--lookup", "on") as client:
        alone = [told(client.post(TEXT, **request)) for request in requests]
        assert not sizes
        found = together(client, requests)
    assert [told(answer) for answer in found] == alone and max(sizes) > 1
    assert any(answer["usage"].get("draft_tokens") for answer in found)
    assert {answer["timings"]["method"] for answer in found} == {"lookup"}


def test_streams_are_the_same_in_pieces(client, sizes):
    """If this fails, a piece of one text is lost, comes twice, or goes to another client."""

    def read(request):
        *pieces, last = client.pieces(TEXT, **request, stream_options={"include_usage": True})
        choices = [piece["choices"][0] for piece in pieces]
        return "".join(one["text"] for one in choices), choices[-1]["finish_reason"], last["usage"]["completion_tokens"]

    requests = REQUESTS[1:4]
    alone = [read(request) for request in requests]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(read, requests)) == alone
    assert max(sizes) > 1


@pytest.mark.slow
@pytest.mark.parametrize("module", ["qwen3_next", "gemma3_text", "deepseek_v2"])
def test_other_kinds_of_layers(module, tmp_path, sizes, monkeypatch):
    """If this fails, texts of hybrid, windowed or latent-attention models are others in company."""
    requests = [request | {"max_tokens": 24} for request in REQUESTS[:4]]
    mx.disable_compile()  # on a CPU it calls a compiler for every new shape
    try:
        with serving(*write_pair(module, tmp_path, monkeypatch), "--num-draft-tokens", "2") as client:
            alone = [told(client.post(TEXT, **request)) for request in requests]
            assert [told(answer) for answer in together(client, requests * 2, gap=0.02)] == alone * 2
    finally:
        mx.enable_compile()
    assert max(sizes) > 1


def test_caches_hold_what_is_said_of_them(client, monkeypatch):
    """If this fails, a later request that begins alike reads on behind tokens that are not there."""
    kept, insert = [], PromptCaches.insert_cache

    def noted(self, model, tokens, cache, **named):
        kept.append((len(tokens), {layer.offset for layer in cache}))
        insert(self, model, tokens, cache, **named)

    monkeypatch.setattr(PromptCaches, "insert_cache", noted)
    tokenizer = generation_of(client).model_provider.tokenizer
    requests = [
        {"prompt": tokenizer.encode(f"{story} {i}"), "max_tokens": 60 - 3 * i, "logprobs": True, "stop": [" t", "xx"]}
        for i, story in enumerate(STORIES)
    ]
    answers = together(client, requests, gap=0.03)
    assert sum(answer["choices"][0]["finish_reason"] == "stop" for answer in answers) > 2
    wait(lambda: len(kept) == len(STORIES))  # a text is told of before its cache is kept
    assert all(held == {length} for length, held in kept)
    for request, answer in zip(requests, answers, strict=True):
        made = [one["id"] for one in answer["choices"][0]["logprobs"]["content"]]
        on = request | {"prompt": request["prompt"] + made, "max_tokens": 12, "stop": []}
        [found, _] = together(client, [on, {"prompt": "A", "max_tokens": 40}])
        # mlx_lm reads one token more where a cache goes on behind the prompt.
        assert found["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(on["prompt"]) - 2
        assert told(found) == told(client.post(TEXT, **on, num_draft_tokens=0))


def test_a_text_goes_over_to_the_engine(client, monkeypatch):
    """If this fails, the second of two requests waits for the end of the first one's text."""
    moved, move = [], row.Row.move

    def noted(self):
        moved.append(len(self.tokens))
        return move(self)

    monkeypatch.setattr(row.Row, "move", noted)
    long = {"prompt": "Once upon a time", "max_tokens": 200, "temperature": 0.8, "seed": 2}
    alone = told(client.post(TEXT, **long))
    assert not moved
    begun = threading.Event()
    take = row.Row.take
    monkeypatch.setattr(row.Row, "take", lambda self, produced: (begun.set(), take(self, produced))[1])
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, TEXT, **long)
        begun.wait()
        client.post(TEXT, prompt="A dog", max_tokens=3)
        assert told(first.result()) == alone
    assert moved[0] > 0 and moved[1] == 0


def test_hang_ups_and_errors_in_between(client, sizes, monkeypatch):
    """If this fails, one client's end or error is others', or its row is written on."""
    requests = REQUESTS[:4]
    alone = [told(client.post(TEXT, **request)) for request in requests]
    processors = row.Row.processors_after

    def broken(self, before):
        if self.request.prompt == "broken":
            return [lambda tokens, logits: logits if len(tokens) < 8 else 1 / 0]
        return processors(self, before)

    monkeypatch.setattr(row.Row, "processors_after", broken)
    gone = []
    for prompt in ("I go now", "I go, too"):
        gone.append(http.client.HTTPConnection(client.host, client.port, timeout=60))
        gone[-1].request("POST", TEXT, json.dumps({"prompt": prompt, "max_tokens": 2000}))
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(client.post, TEXT, **request) for request in requests]
        failing = pool.submit(client.refusal, TEXT, {"prompt": "broken", "max_tokens": 60})
        time.sleep(0.1)
        gone[0].close()
        assert failing.result() == (500, "ZeroDivisionError: division by zero")
        assert [told(one.result()) for one in answers] == alone
    gone[1].close()
    rows = generation_of(client)._batch
    wait(lambda: not rows._rows)
    assert not len(rows._batch) and max(sizes) > 3


def test_a_step_that_fails(client, monkeypatch):
    """If this fails, an error that is no one text's ends the server, or leaves clients waiting."""
    with monkeypatch.context() as patch:
        patch.setattr(Batch, "step", lambda self: 1 / 0)
        requests = [{"prompt": story, "max_tokens": 30} for story in STORIES[:3]]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda request: client.send("POST", TEXT, request), requests))
        assert [status for status, _, _ in found].count(500) >= 2
    assert told(client.post(TEXT, **REQUESTS[0])) == told(client.post(TEXT, **REQUESTS[0], num_draft_tokens=2))


def test_requests_that_cannot_be_batched_wait(client):
    """If this fails, what the engine cannot do is done wrong, or never."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    others = [{"prompt": "A dog", "response_format": form, "max_tokens": 9}, {"prompt": "A dog", "num_draft_tokens": 0}]
    others = [{"temperature": 0, "max_tokens": 20} | other for other in others]
    alone = [told(client.post(TEXT, **request)) for request in others + REQUESTS[:2]]
    assert json.loads(alone[0][0]) in ("yes", "no")
    assert [told(answer) for answer in together(client, (others + REQUESTS[:2]) * 2)] == alone * 2


def test_concurrency_has_a_limit(sizes):
    """If this fails, `--decode-concurrency` has no effect."""
    requests = [{"prompt": story, "max_tokens": 25} for story in STORIES]
    running = []
    with serving(*TINY, "--num-draft-tokens", "2", "--decode-concurrency", "2") as client:
        generation = generation_of(client)
        with pytest.MonkeyPatch.context() as patch:
            step = Batch.step
            patch.setattr(Batch, "step", lambda self: (step(self), running.append(len(self.running)))[0])
            answers = together(client, requests)
        assert max(running) == 2 and generation._batch is not None
    del sizes[:]
    with serving(*TINY, "--num-draft-tokens", "2", "--decode-concurrency", "1") as client:
        assert [told(one) for one in together(client, requests)] == [told(one) for one in answers]
        assert not sizes
