"""Training a draft model for mlx_lm: what it learns, going on, the directory it leaves, mistakes."""

import json
import shutil

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.utils import save_config, save_model
from support.commands import code_of
from support.training import stop_in_update

from mlx_redrafter.cli.main import main
from mlx_redrafter.system.files import read_json
from mlx_redrafter.text.loading import EMBEDDED
from mlx_redrafter.training.drafters.draft_model import DraftModel

FLAGS = ["--iters", "30", "--batch-size", "8", "--warm-up", "5", "--save-every", "25", "--dtype", "float32"]


@pytest.fixture(scope="module")
def text(stories, tmp_path_factory):
    """Rows that the target wrote, two of them held out."""
    out = tmp_path_factory.mktemp("text") / "drafter"
    flags = ["--rows", "26", "--held-out", "2", "--row-length", "40", "--prefix-length", "8", "--iters", "1"]
    assert main(["train", "--model", str(stories), "--out", str(out), *flags, "--eval-every", "0"]) == 0
    return out / "training" / "text"


@pytest.fixture(scope="module")
def small(stories, tmp_path_factory):
    """A random model of one narrow layer with the tokenizer of the target."""
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


def train(out, init, text, model, *flags):
    given = ["--method", "draft-model", "--init", str(init), "--text", str(text), "--model", str(model), *FLAGS]
    return code_of("train", "--out", str(out), *given, "--eval-every", "0", *flags)


def numbers(out):
    return mx.load(str(out / "model.safetensors"))


def log(out):
    return [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(stories, small, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "draft"
    assert train(out, small, text, stories) == 0
    return out


def test_it_learns_and_mlx_lm_drafts_with_it(trained, small, stories):
    """If this fails, training does not teach, or mlx_lm cannot use what it leaves."""
    lines, result = log(trained), read_json(trained / "training" / "result.json")
    assert [line["iter"] for line in lines] == [10, 20, 30] and result["updates"] == 30
    assert lines[-1]["loss"] < lines[0]["loss"] < mx.log(mx.array(512.0)).item() + 0.1
    assert not list((trained / "training").glob("readings*"))
    card = (trained / "README.md").read_text()
    assert "# A draft model for" in card and "--draft-model THIS_DIRECTORY" in card and "--method draft-model" in card
    assert 1 <= result["mean_acceptance_length"] < 5 and "by mlx_lm, 4 draft tokens" in result["measured"]
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


@pytest.mark.parametrize("top_k", ["16", pytest.param("512", marks=pytest.mark.slow)])
def test_the_target_itself_has_nothing_to_learn(stories, text, tmp_path, top_k):
    """If this fails, a model is shown the target's words of other positions than its own."""
    flags = ["--iters", "1", "--warm-up", "0", "--learning-rate", "1e-9", "--teacher-top-k", top_k]
    assert train(tmp_path / "out", stories, text, stories, *flags) == 0
    [line] = log(tmp_path / "out")
    assert line["hits"][0] > 0.99 and 0 < line["loss"] < 3
    result = read_json(tmp_path / "out" / "training" / "result.json")
    assert result["mean_acceptance_length"] > 4.5  # of 5: with its own words all drafts are right


def test_resuming_gives_the_same_weights(trained, stories, small, text, tmp_path, monkeypatch, capsys):
    """If this fails, an interrupted run ends somewhere else than a quiet one."""
    calls = stop_in_update(monkeypatch, DraftModel, 28)
    out = tmp_path / "draft"
    assert train(out, small, text, stories) == 130
    assert not (out / "model.safetensors").exists()
    with (out / "training" / "log.jsonl").open("a") as file:
        file.write('{"iter": 26, "loss": 9.0}\n{"iter": 27, "lo')  # after the checkpoint, and cut short
    assert train(out, small, text, stories) == 2
    assert "already exists: a run was begun there; add --resume" in capsys.readouterr().err
    assert train(out, small, text, stories, "--resume", "--teacher-top-k", "4") == 2
    assert "--teacher-top-k is 4, but the run to resume has 16" in capsys.readouterr().err
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert len(calls) == 28 + 5  # from update 25 on
    assert [line["iter"] for line in log(out)] == [10, 20, 30]
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
    "a model of another tokenizer": (["--init", str(EMBEDDED / "target")], "vocabulary of 4096, the target's is 512"),
    "no updates": (["--iters", "0", "--warm-up", "0"], "--iters is 0, expected 1 or more"),
    "nothing to go on from": (["--resume"], "arguments.json does not exist"),
    "a head's flag": (["--exit-dim", "8"], "--exit-dim does not apply to --method draft-model"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, stories, small, text, tmp_path, capsys):
    """If this fails, a mistake ends in a traceback, or leaves half a model."""
    flags, message = MISTAKES[name]
    assert train(tmp_path / "out", small, text, stories, *flags) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_draft_model_begins_from_a_model(stories, text, tmp_path, capsys):
    flags = ["--method", "draft-model", "--model", str(stories), "--text", str(text)]
    assert main(["train", "--out", str(tmp_path / "out"), *flags]) == 2
    assert "--method draft-model needs --init, an mlx-lm model" in capsys.readouterr().err
