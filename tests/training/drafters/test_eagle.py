"""Training EAGLE-3 heads: they learn what they will be asked, are kept, and go on where they were stopped."""

import argparse
import functools
import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from support import make_model
from support.commands import code_of
from support.rows import TextRows, random_rows, teacher_of
from support.training import check_resumption

from mlx_redrafter import DraftShape
from mlx_redrafter.cli.main import main
from mlx_redrafter.drafting.cached.eagle import EagleConfig, EagleHead
from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.training.acceptance_length import acceptance_length
from mlx_redrafter.training.drafters.eagle import Eagle
from mlx_redrafter.training.flags import add_arguments
from mlx_redrafter.training.loss import Objective
from mlx_redrafter.training.trainer import TrainingPlan, train

pytestmark = pytest.mark.usefixtures("without_a_compiler")

SMALL = ["--rows", "30", "--held-out", "1", "--row-length", "24", "--prefix-length", "8"]
METHOD = Eagle()


@pytest.mark.parametrize("tied", [True, False])
def test_it_learns_what_it_will_be_asked(tied, tmp_path):
    """If this fails, a head is trained with other contexts, positions or neighbours than it drafts with."""
    target, rows = Target(make_model()), random_rows(3, 12)
    layer = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape = EagleConfig(97, 32, layer | {"rms_norm_eps": 1e-5}, 48, (1, 1, 2), unit_contexts=True, tie_output=tied)
    mx.random.seed(1)
    head = EagleHead(shape)
    head.vocab_map = mx.arange(0, 96, 2, dtype=mx.int32)
    check_pair(target, head)
    for part in (head.layer.self_attn.q_proj, head.layer.self_attn.k_proj, head.layer.self_attn.o_proj):
        part.weight = 4 * part.weight
    objective = Objective(step_shares=(1.0, 0.8, 0.5, 0.3), candidates=20)
    teacher = teacher_of(target, rows, tmp_path, objective, np.array(head.vocab_map), layers=head.context_layers)
    batch = METHOD.batches(head, teacher, 0, mx.float32)(np.array([2, 0, 1]), 5)
    contexts, _, at = batch.whole
    found = list(METHOD.scores(head, batch))
    assert [len(scores) for scores in found] == [21, 18, 12, 6]
    for i, place in enumerate(at.tolist()):
        row, t = divmod(place, 12)
        tokens, cache = mx.array(rows[[2, 0, 1][row]])[None], head.make_cache()
        hidden, expected = head.prefill(tokens[:, 1 : t + 2], contexts[row : row + 1, : t + 1], cache)
        cache.begin_trees()
        for k, scores in enumerate(found):
            if k:
                hidden, expected = head.read(CandidateTree.chain(tokens[:, t + k + 1 : t + k + 2]), hidden, cache)
                cache.commit(None, mx.array([0]), 0)
            if i < len(scores):
                assert mx.allclose(scores[i], expected[0, 0, batch.candidates[0]], atol=1e-4), (i, k)


@pytest.fixture(scope="module")
def learnable():
    """Greedy text of a small model: (target, rows)."""
    model = make_model()
    starts = [first * 2 % 97 for first in range(20)]
    said = [[t for t, _ in generate_step(mx.array([start]), model, max_tokens=23)] for start in starts]
    return Target(model), np.array([[start, *text] for start, text in zip(starts, said, strict=True)], np.int32)


def fresh(learnable):
    target, rows = learnable
    return METHOD.new(flags_of("--recipe", "plain"), target, TextRows(rows))


def flags_of(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--out", "x", "--method", "eagle", *words])


def run(learnable, folder, plan, resume=False):
    target, rows = learnable
    head = fresh(learnable)
    teacher = teacher_of(target, rows, folder / "teacher", plan.objective, budget=10**9, layers=head.context_layers)
    train(METHOD, head, teacher, plan, folder, resume)
    return head


def test_training_teaches(learnable, tmp_path):
    """If this fails, training costs time and drafts do not get better."""
    target, rows = learnable
    prompts, shape = [row[:3].tolist() for row in rows[:6]], DraftShape(4, 5, 12)
    before = acceptance_length(target, fresh(learnable), prompts, shape, 20)
    head = run(learnable, tmp_path, TrainingPlan(iters=60, batch_size=8, learning_rate=6e-3))
    assert acceptance_length(target, head, prompts, shape, 20) > before + 0.4


def test_resuming_gives_the_same_weights(learnable, tmp_path, monkeypatch):
    """If this fails, an interrupted run ends somewhere else than a quiet one."""
    plan = TrainingPlan(iters=15, batch_size=4, save_every=5, dropout=0.1)
    check_resumption(functools.partial(run, learnable), Eagle, monkeypatch, tmp_path, plan)


@pytest.fixture(scope="module")
def trained(stories, tmp_path_factory):
    """A head from the command, and the rows."""
    out = tmp_path_factory.mktemp("eagle") / "head"
    flags = ["--method", "eagle", "--draft-vocab-size", "200", "--output-layer", "target", "--eval-every", "0"]
    rate = ["--iters", "25", "--learning-rate", "0.01"]
    assert main(["train", "--model", str(stories), "--out", str(out), *SMALL, *flags, *rate]) == 0
    return out


def test_from_the_command_to_text(trained, stories, capsys):
    """If this fails, a head cannot be trained, kept or decoded with, or changes the text."""
    head = open_drafter(trained)
    assert isinstance(head, EagleHead) and head.context_layers == (1, 2, 3) and head.config.scored == 200
    assert len(head.config.right_by_depth) > 0 and head.config.target_fingerprint["name"] == "tiny"
    lines = [json.loads(line) for line in (trained / "training" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5 and len(lines[0]["hits"]) == 4
    card = (trained / "README.md").read_text()
    assert "# An EAGLE-3 head for" in card and "--method eagle --draft-vocab-size 200" in card and "None" not in card
    assert "context of layers 1, 2, 3, one layer of 64 x 128, output layer: 200 rows, the 200 most frequent" in card
    texts = []
    for draft in (str(trained), "none"):
        capsys.readouterr()
        command = ["generate", "--model", str(stories), "-p", "Once upon a time", "-m", "40", "--json"]
        shape = ["--beam-width", "4", "--beam-length", "4", "--num-draft-tokens", "9"]
        assert main([*command, "--draft", draft, *(shape if draft != "none" else [])]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0]["method"] == "eagle3" and texts[0]["tokens"] == texts[1]["tokens"]
    assert texts[0]["mean_acceptance_length"] > 1.1


def test_going_on_from_a_head(trained, stories, tmp_path, capsys):
    """If this fails, a head has to be trained from nothing when there is more text, or is told to be another."""
    text = ["--model", str(stories), "--text", str(trained / "training" / "text"), "--method", "eagle"]
    more = ["--init", str(trained), "--iters", "1", "--learning-rate", "1e-9", "--eval-every", "0"]
    assert code_of("train", *text, *more, "--out", str(tmp_path / "more")) == 0
    before, after = (open_drafter(folder) for folder in (trained, tmp_path / "more"))
    assert mx.array_equal(before.vocab_map, after.vocab_map)
    assert mx.allclose(before.fc.weight, after.fc.weight, atol=1e-2)
    for flags, message in (
        ([*more, "--draft-vocab-size", "100"], "--draft-vocab-size is 100, but --init"),
        ([*more, "--context-layers", "1", "1", "2"], "--context-layers is [1, 1, 2], but --init"),
        (["--context-layers", "1", "2"], "--context-layers 1 2: expected 3 rising numbers of layers"),
        (["--context-layers", "1", "2", "9"], "--method eagle: layer 9 is to be read, but the target has 3 layers"),
        (["--prefix-window", "9"], "--prefix-window does not apply to --method eagle"),
        (["--prefix-layers", "2"], "--prefix-layers does not apply to --method eagle"),
        (["--q-bits", "4", "--q-group-size", "128"], "does not divide the drafter's hidden_size 64"),
        (["--draft-vocab-size", "513"], "--draft-vocab-size is 513, expected at most 512"),
    ):
        capsys.readouterr()
        assert code_of("train", *text, *flags, "--out", str(tmp_path / "out")) == 2
        assert message in capsys.readouterr().err
