"""Training a draft model for mlx_lm: what it learns, going on, the directory it leaves, mistakes."""

import json
import shutil

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.utils import save_config, save_model

from mlx_redrafter.cli.main import main as whole
from mlx_redrafter.system.files import read_json
from mlx_redrafter.text.loading import EMBEDDED
from mlx_redrafter.training.drafters import draft_model
from mlx_redrafter.training.drafters.draft_model import main

FLAGS = ["--iters", "30", "--batch-size", "8", "--warm-up", "5", "--save-every", "25", "--dtype", "float32"]


@pytest.fixture(scope="module")
def text(stories, tmp_path_factory):
    """Rows that stories260K wrote, two of them held out."""
    out = tmp_path_factory.mktemp("text") / "drafter"
    flags = ["--rows", "26", "--held-out", "2", "--row-length", "40", "--prefix-length", "8", "--iters", "1"]
    assert whole(["train", "--model", str(stories), "--out", str(out), *flags, "--eval-every", "0"]) == 0
    return out / "training" / "text"


@pytest.fixture(scope="module")
def small(stories, tmp_path_factory):
    """A random model of one narrow layer with the tokenizer of stories260K."""
    folder = tmp_path_factory.mktemp("init") / "model"
    shutil.copytree(stories, folder)
    fields = read_json(stories / "config.json")
    fields |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    fields |= {"num_key_value_heads": 4, "head_dim": 8}
    mx.random.seed(0)
    model, args = mlx_lm.utils._get_classes(fields)
    save_model(folder, model(args.from_dict(fields)))
    save_config(fields, folder / "config.json")
    return folder


def command(out, init, text, model, *flags):
    return [str(out), "--init", str(init), "--text", str(text), "--model", str(model), *FLAGS, *flags]


def numbers(out):
    return mx.load(str(out / "model.safetensors"))


def log(out):
    return [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(stories, small, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "draft"
    assert main(command(out, small, text, stories)) == 0
    return out


def test_it_learns_and_mlx_lm_drafts_with_it(trained, small, stories):
    """If this fails, training does not teach, or mlx_lm cannot use what it leaves."""
    lines, result = log(trained), read_json(trained / "training" / "result.json")
    assert [line["iter"] for line in lines] == [20, 30] and result["updates"] == 30
    assert lines[-1]["loss"] < lines[0]["loss"] < mx.log(mx.array(512.0)).item()
    assert not (trained / "training" / "readings").exists()
    target, tokenizer = mlx_lm.load(str(stories))
    draft, own = mlx_lm.load(str(trained))
    assert own.encode("Once upon") == tokenizer.encode("Once upon")
    before = numbers(small)
    assert all(not mx.array_equal(value, before[name]) for name, value in numbers(trained).items())
    texts = [
        [r.token for r in mlx_lm.stream_generate(target, tokenizer, "Once upon a time", max_tokens=20, **options)]
        for options in ({}, {"draft_model": draft})
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("top_k", ["16", "512"])
def test_the_target_itself_has_nothing_to_learn(stories, text, tmp_path, top_k):
    """If this fails, a model is shown the target's words of other positions than its own."""
    flags = ["--iters", "1", "--learning-rate", "1e-9", "--top-k", top_k]
    assert main(command(tmp_path / "out", stories, text, stories, *flags)) == 0
    loss, hits = read_json(tmp_path / "out" / "training" / "result.json")["held_out"]
    assert hits > 0.99 and 0 < loss < 3


def test_resuming_gives_the_same_weights(trained, stories, small, text, tmp_path, monkeypatch, capsys):
    """If this fails, an interrupted run ends somewhere else than a quiet one."""
    real, calls = draft_model._batch, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 28:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(draft_model, "_batch", stopping)
    out = tmp_path / "draft"
    with pytest.raises(KeyboardInterrupt):
        main(command(out, small, text, stories))
    assert not (out / "model.safetensors").exists()
    with (out / "training" / "log.jsonl").open("a") as file:
        file.write('{"iter": 26, "loss": 9.0}\n{"iter": 27, "lo')  # after the checkpoint, and cut short
    assert main(command(out, small, text, stories)) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(command(out, small, text, stories, "--resume", "--top-k", "4")) == 2
    assert "--top-k is 4, but the run to resume has 16" in capsys.readouterr().err
    assert main(command(out, small, text, stories, "--resume")) == 0
    assert len(calls) == 28 + 5 + 1  # from update 25 on, and the held-out rows
    assert [line["iter"] for line in log(out)] == [20, 30]
    quiet, stopped = numbers(trained), numbers(out)
    assert quiet.keys() == stopped.keys()
    assert all(mx.array_equal(quiet[name], stopped[name]) for name in quiet)


MISTAKES = {
    "no such model": (["--init", "/no/such"], "--init /no/such: no such directory"),
    "no such rows": (["--text", "/no/such"], "/no/such/manifest.json: no such file"),
    "rows of another tokenizer": (
        ["--model", str(EMBEDDED / "target"), "--init", str(EMBEDDED / "target")],
        "its rows were cut by another tokenizer than the target's",
    ),
    "a model of another tokenizer": (["--init", str(EMBEDDED / "target")], "--init"),
    "no updates": (["--iters", "0"], "--iters is 0, expected 1 or more"),
    "nothing to go on from": (["--resume"], "arguments.json: no such file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, stories, small, text, tmp_path, capsys):
    """If this fails, a mistake ends in a traceback, or leaves half a model."""
    flags, message = MISTAKES[name]
    assert main(command(tmp_path / "out", small, text, stories, *flags)) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()
