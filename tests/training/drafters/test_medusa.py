"""Training Medusa heads, and fitting their tree: the same trainer, the heads' own places."""

import functools
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from support import make_model
from support.commands import code_of
from support.rows import VOCAB, TextRows
from support.training import check_resumption

from mlx_redrafter import DraftShape
from mlx_redrafter.cli.main import main
from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.medusa import MedusaConfig, MedusaHeads
from mlx_redrafter.drafting.medusa_tree import PUBLISHED, expected_length, fit_choices, rank_accuracies, select
from mlx_redrafter.drafting.proposers import MedusaProposer
from mlx_redrafter.drafting.shape import Drafted
from mlx_redrafter.target.model import Target
from mlx_redrafter.training.acceptance_length import acceptance_length
from mlx_redrafter.training.batches import BatchMaker
from mlx_redrafter.training.drafters.medusa import Medusa
from mlx_redrafter.training.loss import Objective, distillation_loss
from mlx_redrafter.training.teacher import Teacher
from mlx_redrafter.training.trainer import TrainingPlan, train

SMALL = ["--rows", "50", "--held-out", "2", "--row-length", "40", "--prefix-length", "8", "--iters", "30"]


def make_heads(layers=1):
    mx.random.seed(0)
    return MedusaHeads(MedusaConfig(VOCAB, 32, 4, layers))


def test_heads_learn_what_they_will_be_asked(tmp_path):
    """If this fails, heads are trained for places shifted by one from those they draft for."""
    model, weights = make_model(), (1.0, 0.5, 0.25, 0.25)
    target, heads = Target(model), make_heads()
    rows = np.random.default_rng(0).integers(0, VOCAB, (2, 12)).astype(np.int32)
    objective = Objective("hard", step_weights=weights, step_shares=(1.0,) * 4)
    make = BatchMaker(Teacher(target, TextRows(rows), objective, None, tmp_path, 0), 0, tokens=False)
    batch = make(np.array([0, 1]), 0)
    assert batch.embeddings == []
    loss, _ = distillation_loss(Medusa().scores(heads, batch), batch, weights)
    expected = np.zeros(4)
    proposer, plan = MedusaProposer(heads), Drafted(DraftShape(1, 5, 4))
    for row in rows:
        for t in range(12 - 4 - 1):
            hidden = target.forward(mx.array(row[None, : t + 1]), [None, None])[0][:, -1]
            hidden = hidden.astype(mx.bfloat16).astype(mx.float32)
            guesses = proposer.propose(hidden, mx.array(row[t + 1 : t + 2]), plan).tokens[0, 1:].tolist()
            for k in range(4):
                said = np.array(nn.log_softmax(heads(hidden)[0, k]))
                assert guesses[k] == said.argmax()  # what is drafted k places after the root
                after = target.forward(mx.array(row[None, : t + k + 2]), [None, None])[1][0, -1]
                expected[k] -= said[mx.argmax(after).item()] / 14
    assert loss.item() == pytest.approx(float(expected @ weights) / sum(weights), rel=3e-3)


@pytest.fixture(scope="module")
def learnable():
    """Greedy text of a small model: (target, rows)."""
    model = make_model()
    starts = [first * 2 % VOCAB for first in range(20)]
    said = [[t for t, _ in generate_step(mx.array([start]), model, max_tokens=23)] for start in starts]
    return Target(model), np.array([[start, *text] for start, text in zip(starts, said, strict=True)], np.int32)


def run(learnable, folder, plan, resume=False):
    target, rows = learnable
    heads = make_heads()
    teacher = Teacher(target, TextRows(rows), plan.objective, None, folder / "teacher", 10**9)
    train(Medusa(), heads, teacher, plan, folder, resume)
    return heads


def test_training_teaches(learnable, tmp_path):
    """If this fails, training costs time and drafts do not get better."""
    target, rows = learnable
    prompts, shape = [row[:3].tolist() for row in rows[:6]], DraftShape(10, 5, 12)
    before = acceptance_length(target, make_heads(), prompts, shape, 20)
    plan = TrainingPlan(iters=100, batch_size=8, learning_rate=4e-3)
    heads = run(learnable, tmp_path, plan)
    assert acceptance_length(target, heads, prompts, shape, 20) > before + 0.5


def test_resuming_gives_the_same_weights(learnable, tmp_path, monkeypatch):
    """If this fails, an interrupted run ends somewhere else than a quiet one."""
    plan = TrainingPlan(iters=15, batch_size=4, save_every=5)
    check_resumption(functools.partial(run, learnable), Medusa, monkeypatch, tmp_path, plan)


def test_only_what_counts_is_looked_at():
    """If this fails, a tree is fitted to what the user says, or to padding."""
    target, heads = Target(make_model()), make_heads(0)
    row = np.random.default_rng(0).integers(0, VOCAB, 30).tolist()
    counted = np.zeros(30, bool)
    counted[10:20] = True
    found = rank_accuracies(target, heads, [row], VOCAB, [counted])
    hidden, _ = target.forward(mx.array([row]), [None, None])
    order = np.argsort(-np.array(heads(hidden[0])), axis=-1)
    for k in range(4):
        places = [t for t in range(30 - 4 - 1) if counted[t + 2 : t + k + 3].all()]
        assert len(places) == 10 - k
        right = np.mean([order[t, k] == row[t + k + 2] for t in places], axis=0)
        assert np.allclose(found[k], right)
    assert expected_length(found, [(0,), (0, 1)]) == pytest.approx(1 + found[0][0] + found[0][0] * found[1][1])


@pytest.fixture(scope="module")
def trained(stories, tmp_path_factory):
    """Heads from the command, with their tree, and the rows."""
    out = tmp_path_factory.mktemp("medusa") / "heads"
    flags = ["--method", "medusa", "--beam-length", "4", "--tree-size", "9", "--eval-every", "15"]
    assert main(["train", "--model", str(stories), "--out", str(out), *SMALL, *flags, "--learning-rate", "0.01"]) == 0
    return out


def test_from_the_command_to_text(trained, stories, capsys):
    """If this fails, heads cannot be trained, kept or decoded with, or change the text."""
    heads = open_drafter(trained)
    assert isinstance(heads, MedusaHeads) and heads.config.medusa_num_heads == 3
    assert len(heads.config.medusa_choices) == 9 and heads.config.medusa_choices != PUBLISHED[:9]
    lines = [json.loads(line) for line in (trained / "training" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] and len([1 for line in lines if "acceptance" in line]) == 2
    card, result = (trained / "README.md").read_text(), json.loads((trained / "training" / "result.json").read_text())
    assert "# Medusa heads for" in card and "- medusa\n" in card and "--method medusa" in card
    assert "3 heads of 1 residual blocks" in card and "static tree of 9 nodes" in card
    assert result["bytes_per_draft_step"] == heads.bytes_per_draft_step() > 3 * 512 * 64 * 2
    texts = []
    for draft in (str(trained), "none"):
        capsys.readouterr()
        command = ["generate", "--model", str(stories), "-p", "Once upon a time", "-m", "40", "--json"]
        shape = ["--beam-width", "10", "--beam-length", "4", "--num-draft-tokens", "9"]
        assert main([*command, "--draft", draft, *(shape if draft != "none" else [])]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0]["method"] == "medusa" and texts[0]["tokens"] == texts[1]["tokens"]
    assert texts[0]["mean_acceptance_length"] > 1.1


@pytest.mark.parametrize("source", ["written", "rows"])
def test_fitting_a_tree_to_converted_heads(trained, stories, tmp_path, capsys, source):
    """If this fails, published heads keep a tree that was made for another model."""
    heads = tmp_path / "heads"
    assert main(["convert", "drafter", "--hf-path", str(trained), "--mlx-path", str(heads)]) == 0
    before, weights = json.loads((heads / "config.json").read_text()), (heads / "model.safetensors").read_bytes()
    text = {"written": ["--row-length", "40"], "rows": ["--text", str(trained / "training" / "text")]}[source]
    command = ["convert", "medusa-tree", "--mlx-path", str(heads), "--target", str(stories), "--rows", "6", *text]
    assert main([*command, "--tree-size", "12"]) == 0
    assert "a tree of 12 nodes, expected acceptance length " in capsys.readouterr().out
    after = json.loads((heads / "config.json").read_text())
    choices = open_drafter(heads).config.medusa_choices
    assert len(choices) == 12 and choices == select(choices, 10, 3, 12)
    assert before | {"medusa_choices": after["medusa_choices"]} == after != before
    assert (heads / "model.safetensors").read_bytes() == weights
    assert [p.name for p in heads.iterdir() if p.name.startswith(".")] == []
    if source == "rows":
        from mlx_redrafter.text.loading import load_target
        from mlx_redrafter.training.text.shards import Rows

        tokens, _ = Rows(trained / "training" / "text")[np.arange(44, 50)]
        target, drafter = Target(load_target(stories, None, "float32")[0]), open_drafter(heads)
        drafter.set_dtype(mx.float32)
        assert choices == fit_choices(rank_accuracies(target, drafter, tokens.tolist()), 12)


MISTAKES = {
    "a width": (["--method", "medusa", "--exit-dim", "32"], "--exit-dim does not apply to --method medusa"),
    "a recurrence": (["--method", "medusa", "--no-rnn"], "--no-rnn does not apply to --method medusa"),
    "a vocabulary": (
        ["--method", "medusa", "--draft-vocab-size", "9"],
        "--draft-vocab-size does not apply to --method",
    ),
    "a tied layer": (["--method", "medusa", "--output-layer", "tied"], "--output-layer is tied, which --method medusa"),
    "a tree": (["--tree-size", "9"], "--tree-size does not apply to --method redrafter"),
    "no tree": (["--method", "medusa", "--tree-size", "0"], "--tree-size is 0, expected 1 to 1024"),
    "groups": (
        ["--method", "medusa", "--q-bits", "4", "--q-group-size", "128"],
        "does not divide the drafter",
    ),
    "heads of another kind": (["--init", "HEADS"], "is a drafter of another kind than --method redrafter"),
    "other heads": (["--method", "medusa", "--init", "HEADS"], "--beam-length is 5, but --init"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, trained, stories, tmp_path, capsys):
    """If this fails, a flag does nothing, or a mistake ends in a traceback."""
    flags, message = MISTAKES[name]
    flags = [str(trained) if flag == "HEADS" else flag for flag in flags]
    text = ["--text", str(trained / "training" / "text")]
    assert code_of("train", "--model", str(stories), "--out", str(tmp_path / "out"), *SMALL, *text, *flags) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


def test_mistakes_about_trees(stories, trained, tmp_path, capsys):
    for flags, message in (
        (["--mlx-path", str(tmp_path)], "config.json: no such file"),
        (["--mlx-path", str(trained), "--tree-size", "0"], "--tree-size is 0, expected 1 or more"),
        (["--mlx-path", str(trained)], "it was made for tiny"),  # and not for the embedded target
        (["--mlx-path", str(trained), "--target", str(stories), "--text", str(tmp_path)], "manifest.json: no such"),
    ):
        before = (trained / "config.json").read_bytes()
        assert main(["convert", "medusa-tree", *flags]) == 2
        assert message in capsys.readouterr().err
        assert (trained / "config.json").read_bytes() == before
