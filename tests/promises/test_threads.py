"""Threads: two that generate at once, one that goes on where another began; and caches of one user at a time.

Two users of one thing at once. Looked for: two answers in one conversation, two generations on one prompt cache, two
threads with one model (ours beside ours, ours beside mlx_lm), a generation continued in another thread.
"""

import collections
import itertools
import threading

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors
from mlx_redrafter.benchmarks.architectures import small_models
from support import make_drafter, make_model

from mlx_redrafter import Conversation, DraftShape, UserError, generate, stream_generate
from mlx_redrafter.target.model import Target

PROMPTS = ["import os\n\n\ndef read_lines(path):\n", "class Reader:\n    def __init__(self", "def mean(values):\n    "]
SHAPES = {"chain": DraftShape(), "tree": DraftShape(4, 5, 7), "auto": "auto"}


@pytest.fixture(scope="module")
def pair(pair):
    """A small model with the embedded one's tokenizer."""
    return make_model(vocab=4096, hidden=64), make_drafter(vocab=4096, hidden=64), pair[2]


@pytest.fixture(scope="module")
def plain(pair):
    """Texts that one thread writes alone, plainly."""
    model, _, tokenizer = pair
    return [[r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=24)] for prompt in PROMPTS]


def in_thread(function):
    """What a function returns, called in a thread of its own."""
    found = []

    def call():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_threads_that_generate_with_one_model(pair, plain, shape):
    """If this fails, one call finds the other's stand-ins in the model, and half of all texts end in an error."""
    model, drafter, tokenizer = pair
    found = {}

    def write(number):
        for i, prompt in enumerate(PROMPTS):
            options = {"max_tokens": 24, "shape": shape} if (number + i) % 3 else {"max_tokens": 24}
            used = drafter if (number + i) % 3 else None
            try:
                found[number, i] = [r.token for r in stream_generate(model, tokenizer, prompt, used, **options)]
            except Exception as error:
                found[number, i] = error

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {(number, i): plain[i] for number in range(4) for i in range(len(PROMPTS))}  # 12 of 12


@pytest.fixture
def meeting(monkeypatch):
    """A thread named "ours" waits, at every seventh linear layer, until the other one has called three."""
    whole, steps, moved = nn.Linear.__call__, collections.Counter(), threading.Condition()

    def call(self, x):
        name = threading.current_thread().name
        with moved:
            steps[name] += 1
            moved.notify_all()
            if name == "ours" and steps[name] % 7 == 0:
                enough = steps["mlx_lm"] + 3
                moved.wait_for(lambda: steps["mlx_lm"] >= enough, timeout=2)
        return whole(self, x)

    monkeypatch.setattr(nn.Linear, "__call__", call)


@pytest.mark.parametrize("kind", ["attention", "recurrent states"])
def test_mlx_lm_in_another_thread(pair, monkeypatch, meeting, kind):
    """If this fails, a plain mlx_lm call beside one of ours meets our stand-ins: its text is wrong, or ours is."""
    model, drafter, tokenizer = pair
    if kind != "attention":
        monkeypatch.setitem(small_models.CONFIGS["common"], "vocab_size", 4096)
        model = small_models.build("qwen3_next")
        drafter = small_models.random_drafter(Target(model))
    prompts, options = [*PROMPTS, *(text.upper() for text in PROMPTS)], {"max_tokens": 16}
    expected = [mlx_lm.generate(model, tokenizer, prompt, **options) for prompt in prompts]
    found, failed = {"mlx_lm": [], "ours": []}, []
    monkeypatch.setattr(threading, "excepthook", failed.append)

    def theirs():
        for prompt in itertools.cycle(prompts):
            found["mlx_lm"].append(mlx_lm.generate(model, tokenizer, prompt, **options))
            if len(found["mlx_lm"]) >= len(prompts) and not ours.is_alive():
                return

    def mine():
        for prompt in prompts:
            found["ours"].append(generate(model, tokenizer, prompt, drafter=drafter, shape=DraftShape(), **options))

    ours, other = threading.Thread(target=mine, name="ours"), threading.Thread(target=theirs, name="mlx_lm")
    for thread in (ours, other):
        thread.start()
    for thread in (ours, other):
        thread.join()
    assert not failed, failed[0]
    assert found["ours"] == expected
    assert found["mlx_lm"] == [expected[i % len(prompts)] for i in range(len(found["mlx_lm"]))]


@pytest.mark.parametrize("lookup", ["off", "on"])
@pytest.mark.parametrize("penalty", [None, 1.5], ids=["", "processors"])
@pytest.mark.parametrize("shape", [None, *SHAPES.values()], ids=["plain", *SHAPES])
def test_every_token_in_another_thread(pair, shape, penalty, lookup):
    """If this fails, a web framework that takes each piece of an answer in any of its threads gets an error."""
    model, drafter, tokenizer = pair
    processors = {"logits_processors": make_logits_processors(repetition_penalty=penalty)}
    plain = [r.token for r in stream_generate(model, tokenizer, PROMPTS[0], max_tokens=16, **processors)]
    cache = make_prompt_cache(model)
    options = {"lookup": lookup, "prompt_cache": cache} | processors | ({} if shape is None else {"shape": shape})
    used = None if shape is None else drafter
    stream = stream_generate(model, tokenizer, PROMPTS[0], used, max_tokens=16, **options)
    for token in plain[:-1]:
        response = in_thread(lambda: next(stream))
        assert not isinstance(response, Exception), response
        assert response.token == token
    in_thread(stream.close)
    more = [r.token for r in stream_generate(model, tokenizer, "x", drafter, max_tokens=8, prompt_cache=cache)]
    ids = [*tokenizer.encode(PROMPTS[0]), *plain[:-1], *tokenizer.encode("x")]
    assert more == [r.token for r in stream_generate(model, tokenizer, ids, max_tokens=8)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_log_probabilities_of_the_thread_that_asked(pair, shape):
    """If this fails, a generation that moved to another thread gives no log-probabilities there."""
    model, drafter, tokenizer = pair
    stream = stream_generate(model, tokenizer, PROMPTS[0], drafter, max_tokens=12, shape=shape)
    expected = list(stream_generate(model, tokenizer, PROMPTS[0], max_tokens=12))
    for one in expected:

        def take():
            response = next(stream)
            return mx.argmax(response.logprobs).item(), response.logprobs[response.token].item()

        token, value = in_thread(take)
        assert token == one.token and value == pytest.approx(one.logprobs[one.token].item(), abs=1e-4)


def test_one_prompt_cache_has_one_user(pair, plain):
    """If this fails, two generations write into one cache in turn, and both texts are wrong."""
    model, drafter, tokenizer = pair
    for used in (None, drafter):
        cache = make_prompt_cache(model)
        first = stream_generate(model, tokenizer, PROMPTS[0], used, max_tokens=24, prompt_cache=cache)
        taken = [next(first).token for _ in range(3)]
        for again in (cache, list(cache)):
            with pytest.raises(UserError, match="prompt_cache is in use by a generation that has not ended"):
                next(stream_generate(model, tokenizer, "x", used, prompt_cache=again))
        assert taken + [r.token for r in first] == plain[0]
        assert list(stream_generate(model, tokenizer, "x", used, max_tokens=2, prompt_cache=cache))


def test_a_conversation_gives_one_answer_at_a_time(pair):
    """If this fails, two answers go into one history and one cache, a token each in turn."""
    model, drafter, tokenizer = pair
    talk = Conversation(model, tokenizer, drafter, max_tokens=16)
    first, second = talk.ask("import os"), talk.ask("import sys")
    pieces = [next(first).text]
    for refused in (lambda: next(second), lambda: next(talk.ask("x")), talk.reset, lambda: talk.save("x", "x")):
        with pytest.raises(UserError, match="an earlier answer is still open"):
            refused()
    with pytest.raises(UserError, match="an earlier answer is still open"):
        raise in_thread(lambda: next(talk.ask("x")))
    pieces += [r.text for r in first]
    alone = Conversation(model, tokenizer, drafter, max_tokens=16)
    assert "".join(pieces) == "".join(r.text for r in alone.ask("import os"))
    assert talk.messages == alone.messages
    assert [r.text for r in talk.ask("import sys")] == [r.text for r in alone.ask("import sys")]
    left = talk.ask("x")
    next(left)
    left.close()
    talk.reset()
    assert talk.messages == []
