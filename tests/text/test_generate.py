"""Text in, text out: a drop-in for mlx-lm's stream_generate."""

import dataclasses
import inspect
import io
import json

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import GenerationResponse as MlxLmResponse
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.sample_utils import make_sampler
from support import make_drafter

import mlx_redrafter
from mlx_redrafter import DraftShape, UserError, generate, stream_generate
from mlx_redrafter.cli.main import main
from mlx_redrafter.decoding.sampling import position_keyed

PROMPT = "import os\n\n\ndef read_lines(path):\n"


@pytest.fixture(scope="module")
def expected(pair):
    model, _, tokenizer = pair
    return list(mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=40))


def test_same_pieces_of_text_as_mlx_lm(pair, expected):
    """If this fails, a program that moved from mlx-lm prints something else."""
    model, drafter, tokenizer = pair
    for used in (None, drafter):
        found = list(stream_generate(model, tokenizer, PROMPT, used, max_tokens=40))
        assert [r.token for r in found] == [r.token for r in expected]
        assert [r.text for r in found] == [r.text for r in expected]
        assert [r.finish_reason for r in found] == [r.finish_reason for r in expected]
        assert [r.generation_tokens for r in found] == list(range(1, 41))
        for ours, theirs in zip(found, expected):
            assert mx.abs(ours.logprobs - theirs.logprobs).max().item() < 1e-3
        assert found[-1].method == ("plain" if used is None else "redrafter")


def test_response_has_mlx_lms_fields_first():
    """If this fails, code that reads mlx-lm's responses breaks."""
    theirs = [f.name for f in dataclasses.fields(MlxLmResponse)]
    assert [f.name for f in dataclasses.fields(mlx_redrafter.GenerationResponse)][: len(theirs)] == theirs
    known = inspect.signature(stream_generate).parameters
    assert {"max_tokens", "sampler", "prompt_cache", "prefill_step_size", "prompt_progress_callback"} <= set(known)


def test_statistics_add_up(pair):
    """If this fails, the acceptance figures do not describe the text that was written."""
    model, drafter, tokenizer = pair
    for count in (2, 9, 40):
        last = list(stream_generate(model, tokenizer, PROMPT, drafter, max_tokens=count))[-1]
        assert last.generation_tokens == count
        assert last.steps * last.mean_acceptance_length == pytest.approx(count - 1)
        assert 1 + sum(last.acceptance_by_position) == pytest.approx(last.mean_acceptance_length)
        assert last.acceptance_by_position == sorted(last.acceptance_by_position, reverse=True)
    drafted = [
        r.from_draft for r in stream_generate(model, tokenizer, PROMPT, drafter, max_tokens=40, shape=DraftShape())
    ]
    assert 0 < sum(drafted) < 40 and not drafted[0]


def test_stops_at_the_end_of_text(pair, expected):
    """If this fails, text goes on after the model has ended it."""
    model, drafter, tokenizer = pair
    stop = expected[17].token
    first = [r.token for r in expected].index(stop)
    saved = set(tokenizer.eos_token_ids)
    try:
        tokenizer.eos_token_ids = {stop}
        for used in (None, drafter):
            cache = make_prompt_cache(model)
            found = list(stream_generate(model, tokenizer, PROMPT, used, max_tokens=40, prompt_cache=cache))
            theirs = list(mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=40))
            assert [r.token for r in found] == [r.token for r in theirs] and len(found) == first + 1
            assert [r.text for r in found] == [r.text for r in theirs]
            assert found[-1].finish_reason == "stop"
            assert cache[0].offset == found[-1].prompt_tokens + first + 1
    finally:
        tokenizer.eos_token_ids = saved


@pytest.mark.parametrize("stop_after", [1, 2, 3, 7, None])
def test_prompt_cache_goes_on_where_it_was_left(pair, expected, stop_after, tmp_path):
    """If this fails, a conversation's cache holds rejected tokens, or lacks written ones.

    Written by ours with a drafter, left anywhere; saved and loaded by mlx-lm; read on by mlx-lm.
    """
    model, drafter, tokenizer = pair
    cache, taken = make_prompt_cache(model), []
    stream = stream_generate(model, tokenizer, PROMPT, drafter, max_tokens=20, prompt_cache=cache)
    for response in stream:
        taken.append(response.token)
        if len(taken) == stop_after:
            break
    stream.close()
    ids = tokenizer.encode(PROMPT)
    assert cache[0].offset == len(ids) + len(taken)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    more = tokenizer.encode("    return\n")
    found = [r.token for r in mlx_lm.stream_generate(model, tokenizer, more, max_tokens=20, prompt_cache=loaded)]
    afresh = [r.token for r in mlx_lm.stream_generate(model, tokenizer, [*ids, *taken, *more], max_tokens=20)]
    assert found == afresh
    again = [r.token for r in stream_generate(model, tokenizer, more, drafter, max_tokens=20, prompt_cache=cache)]
    assert again == afresh


def test_seed_gives_the_same_text_with_and_without_drafts(pair):
    model, drafter, tokenizer = pair
    texts = {
        generate(model, tokenizer, PROMPT, drafter=used, max_tokens=60, chooser=position_keyed(0.8, 7, top_p=0.9))
        for used in (None, drafter, make_drafter(vocab=4096, hidden=384))
    }
    assert len(texts) == 1


def test_a_sampler_of_mlx_lm(pair, expected):
    """If this fails, mlx-lm's samplers cannot be handed over."""
    model, drafter, tokenizer = pair
    sampler = make_sampler(1.0, top_k=1)  # samples, but can only sample the best
    text = generate(model, tokenizer, PROMPT, drafter=drafter, max_tokens=40, sampler=sampler)
    assert text == "".join(r.text for r in expected)


def test_progress_and_prefill_chunks(pair, expected):
    """If this fails, long prompts are read in one piece, or in pieces that do not fit together."""
    model, drafter, tokenizer = pair
    for used in (None, drafter):
        seen = []
        found = list(
            stream_generate(
                model, tokenizer, PROMPT, used, max_tokens=40, prefill_step_size=5,
                prompt_progress_callback=lambda *done, seen=seen: seen.append(done),
            )
        )  # fmt: skip
        total = len(tokenizer.encode(PROMPT))
        assert [r.token for r in found] == [r.token for r in expected]
        assert seen == [(n, total) for n in range(0, total - 1, 5)] + [(total, total)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [1] * 2048}, "the prompt has 2048 tokens, expected fewer than the model's context of 2048"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"prefill_step_size": 0}, "prefill_step_size is 0"),
        ({"shape": DraftShape(4, 5, 99)}, "--num-draft-tokens is 99"),
        ({"drafter": make_drafter()}, "hidden_size is 32, but the target's is 384"),
        ({"sampler": make_sampler(1.0), "chooser": position_keyed(1.0)}, "both given"),
    ],
)
def test_mistakes(pair, changes, message):
    model, drafter, tokenizer = pair
    arguments = {"prompt": PROMPT, "drafter": drafter} | changes
    with pytest.raises(UserError, match=message):
        next(stream_generate(model, tokenizer, **arguments))


def test_json(pair, expected, capsys):
    """If this fails, scripts that read the command's output break."""
    assert main(["generate", "-p", PROMPT, "-m", "40", "--beam-width", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"] == [r.token for r in expected]
    assert report["text"] == "".join(r.text for r in expected)
    assert set(report) == {
        "model", "text", "tokens", "prompt_tokens", "prompt_tps", "generation_tokens", "generation_tps", "steps",
        "mean_acceptance_length", "acceptance_by_position", "peak_memory_gb", "finish_reason", "method", "reason",
        "shape", "plain_share", "lookup_share", "forced_share", "draft_tokens", "accepted_tokens", "forced_tokens",
    }  # fmt: skip
    chain = {"beam_width": 1, "beam_length": 4, "num_draft_tokens": 3, "tree_policy": "best-first"}
    assert report["shape"] == chain and report["plain_share"] == 0
    assert report["method"] == "redrafter" and report["mean_acceptance_length"] > 1.2


def test_command_prints_text_and_figures(expected, capsys):
    assert main(["generate", "-p", PROMPT, "-m", "40", "--draft", "none"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("".join(r.text for r in expected)) and "Generation: 40 tokens" in out
    assert "acceptance" not in out
    assert main(["generate", "-p", PROMPT, "-m", "40", "--seed", "3", "--temp", "0.7"]) == 0
    sampled = capsys.readouterr().out
    assert "Mean acceptance length" in sampled
    assert main(["generate", "-p", PROMPT, "-m", "40", "--seed", "3", "--temp", "0.7", "--draft", "none"]) == 0
    assert capsys.readouterr().out.split("==========")[0] == sampled.split("==========")[0]


def test_prompt_from_the_shell_and_from_standard_input(expected, capsys, monkeypatch):
    """If this fails, a line break typed as in mlx_lm.generate, or a piped prompt, means something else."""
    command = ["generate", "-m", "40", "--json", "-p"]
    assert main([*command, PROMPT.replace("\n", "\\n")]) == 0
    typed = json.loads(capsys.readouterr().out)["tokens"]
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert main([*command, "-"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == typed == [r.token for r in expected]


def test_another_model(stories, capsys):
    """If this fails, only the embedded model works."""
    assert main(["generate", "--model", str(stories), "-p", "Once upon a time", "-m", "20", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["method"] == "plain" and report["generation_tokens"] == 20
    assert "there was a" in report["text"]
