"""The text of an answer is that of `generate`, and greedily that of mlx_lm's server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.serving import TINY, mlx_lm_serving

from mlx_redrafter.cli.main import main

TEXT = "/v1/completions"
PROMPT = "Once upon a time, there was a little dog. The dog"
SAMPLING = {
    "temperature": 0.9,
    "top_p": 0.95,
    "min_p": 0.01,
    "top_k": 100,
    "xtc_probability": 0.2,
    "xtc_threshold": 0.1,
}


@pytest.mark.parametrize("draft", [{}, {"num_draft_tokens": 0}, {"num_draft_tokens": 5}, {"draft_model": "none"}])
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_equal_to_generate(served, capsys, temperature, draft):
    """If this fails, a server's text is not what `generate` writes for the same seed, or drafts change it."""
    fields = SAMPLING | {"temperature": temperature}
    flags = [f"--{name.replace('_', '-').replace('temperature', 'temp')}={value}" for name, value in fields.items()]
    assert main(["generate", *TINY, "-p", PROMPT, "--seed", "7", "-m", "40", "--json", *flags]) == 0
    expected = json.loads(capsys.readouterr().out)
    answer = served.post(TEXT, prompt=PROMPT, seed=7, max_tokens=40, **fields, **draft)
    assert answer["choices"][0]["text"] == expected["text"]
    assert answer["choices"][0]["finish_reason"] == expected["finish_reason"]


def test_without_a_seed_texts_differ(served):
    texts = {served.post(TEXT, prompt=PROMPT, temperature=1.0)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 3


PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}


def test_penalties_do_not_depend_on_what_was_cached(served):
    """If this fails, the second of two equal requests has another text than the first."""
    far = {f"{name}_context_size": 500 for name in ("repetition", "presence", "frequency")}
    prompt = "Lily had a big red ball and a small dog. One day, the ball was lost in the park. Lily was sad. The"
    fields = {"prompt": prompt, "max_tokens": 30, **PENALTIES, **far}
    first = served.post(TEXT, **fields)
    again = served.post(TEXT, **fields)
    assert (
        again["usage"]["prompt_tokens_details"]["cached_tokens"]
        > first["usage"]["prompt_tokens_details"]["cached_tokens"]
    )
    assert again["choices"] == first["choices"]
    assert served.post(TEXT, prompt=prompt, max_tokens=30)["choices"] != first["choices"]


SCRIPT: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": PROMPT}),
    ("/v1/completions", {"prompt": PROMPT, "logprobs": True, "top_logprobs": 3, "max_tokens": 5}),
    ("/v1/completions", {"prompt": "Tom had a ball.", "logit_bias": {"13": -100}} | PENALTIES),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Tell me of a cat."}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "A cat"}]}]}),
]


def test_equal_to_mlx_lms_server(served):
    """If this fails, whoever comes from mlx_lm's server gets other texts."""
    with mlx_lm_serving("--model", TINY[1]) as client:
        for path, fields in SCRIPT:
            ours, theirs = (
                each.post(path, **({"max_tokens": 30, "temperature": 0} | fields))["choices"][0]
                for each in (served, client)
            )
            tops = [choice.pop("logprobs", {"content": []})["content"] for choice in (ours, theirs)]
            assert ours == theirs
            assert len(tops[0]) == len(tops[1]) == (5 if fields.get("logprobs") else 0)
            for mine, other in zip(*tops):
                other = sorted(other["top_logprobs"], key=lambda one: -one["logprob"])
                assert [one["id"] for one in mine["top_logprobs"]] == [one["id"] for one in other]
                assert [one["logprob"] for one in mine["top_logprobs"]] == pytest.approx(
                    [one["logprob"] for one in other], abs=1e-4
                )
