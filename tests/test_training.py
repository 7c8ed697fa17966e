"""Training: the loss, what it learns, and going on after a stop."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import make_drafter, make_model
from mlx.utils import tree_flatten

from mlx_redrafter import UserError
from mlx_redrafter.cli import main
from mlx_redrafter.drafter import DrafterConfig, load_drafter
from mlx_redrafter.settings import DraftShape
from mlx_redrafter.target import Target
from mlx_redrafter.training.command import new_drafter
from mlx_redrafter.training.data import cut_prefixes, read_texts, self_written
from mlx_redrafter.training.loss import TeacherReader, distillation_loss, soft_cross_entropy, teacher
from mlx_redrafter.training.trainer import TrainingPlan, _picks, acceptance_length, train


def test_soft_cross_entropy_and_its_gradient():
    """If this fails, training walks in a wrong direction."""
    mx.random.seed(0)
    logits = mx.random.normal((5, 50)) * 4
    ids = mx.array(np.stack([np.random.default_rng(i).permutation(50)[:3] for i in range(5)]))
    shares = mx.softmax(mx.random.normal((5, 3)), axis=-1)
    weights = mx.arange(1.0, 6.0)

    def ours(x):
        return mx.sum(weights * soft_cross_entropy(x, ids, shares))

    def written_out(x):
        return -mx.sum(weights * mx.sum(shares * mx.take_along_axis(nn.log_softmax(x), ids, axis=-1), axis=-1))

    assert ours(logits).item() == pytest.approx(written_out(logits).item(), rel=1e-5)
    assert mx.abs(mx.grad(ours)(logits) - mx.grad(written_out)(logits)).max().item() < 1e-5


def test_teacher():
    logits = mx.array([[[0.0, 3.0, 1.0, 2.0]]])
    ids, shares = teacher(logits, 2)
    assert set(ids[0, 0].tolist()) == {1, 3} and shares.sum().item() == pytest.approx(1)
    assert teacher(logits, 1)[0].tolist() == [[[1]]]


def test_loss_reads_what_decoding_will_read():
    """If this fails, the head is trained on a context or tokens shifted by one."""
    target, drafter = Target(make_model()), make_drafter()
    rows = np.random.default_rng(0).integers(0, 97, (2, 12)).astype(np.int32)
    batch = TeacherReader(target, rows, 97, 0)(np.array([0, 1]))
    loss, hits = distillation_loss(drafter, *batch, step_weights=[1.0, 0.5, 0.25])
    expected, right = np.zeros(3), np.zeros(3)
    for b in range(2):
        tokens = mx.array(rows[b : b + 1])
        for t in range(9):
            hidden, _ = target.forward(tokens[:, : t + 1], [None, None])
            state = None
            for k in (1, 2, 3):
                state = drafter.advance(target.embed(tokens[0, t + k]), state)
                guess = drafter.logits(drafter.project_context(hidden[0, -1].astype(mx.bfloat16)), state)
                _, said = target.forward(tokens[:, : t + k + 1], [None, None])
                expected[k - 1] -= mx.sum(mx.softmax(said[0, -1]) * nn.log_softmax(guess)).item() / 18
                right[k - 1] += (mx.argmax(guess) == mx.argmax(said[0, -1])).item() / 18
    assert loss.item() == pytest.approx(float(expected @ [1, 0.5, 0.25]) / 1.75, rel=2e-3)
    assert np.allclose(hits, right)


def test_teacher_reads_a_row_once(monkeypatch):
    """If this fails, the byte budget buys nothing, or is overrun."""
    target = Target(make_model())
    rows = np.random.default_rng(0).integers(0, 97, (6, 12)).astype(np.int32)
    read, real = [], target.forward
    monkeypatch.setattr(target, "forward", lambda tokens, cache: read.append(tokens.shape[0]) or real(tokens, cache))
    reader = TeacherReader(target, rows, 4, 10**9)
    first = reader(np.array([0, 1, 2]))
    again = reader(np.array([2, 1, 5]))
    assert read == [3, 1]
    assert mx.array_equal(first[0][1], again[0][1]) and mx.array_equal(first[2][2], again[2][0])
    read.clear()
    scarce = TeacherReader(target, rows, 4, budget=0)
    scarce(np.array([0, 1]))
    scarce(np.array([0, 1]))
    assert read == [2, 2]


def test_every_row_is_read_once_per_pass():
    plan = TrainingPlan(batch_size=4, seed=3)
    picks = np.concatenate([_picks(plan, i, 10) for i in range(5)])
    assert sorted(picks[:10]) == sorted(picks[10:]) == list(range(10))
    assert list(picks[:10]) != list(picks[10:])


def test_prefixes(tmp_path):
    prefixes = cut_prefixes([[1] * 3, list(range(100))], 20, 5, seed=0)
    assert prefixes.shape == (20, 5) and (np.diff(prefixes) == 1).all()
    with pytest.raises(UserError, match="no text has as many as 200 tokens"):
        cut_prefixes([[1, 2]], 3, 200, 0)
    with pytest.raises(UserError, match="no such file"):
        read_texts([str(tmp_path / "none")])
    (tmp_path / "a.txt").write_text("  \n")
    with pytest.raises(UserError, match="no text found"):
        read_texts([str(tmp_path)])
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="not readable as text"):
        read_texts([str(tmp_path / "b.bin")])


def test_self_written_text_is_the_targets(pair, prefixes):
    """If this fails, the drafter learns from somebody else's text."""
    model, *_ = pair
    target = Target(model)
    starts = np.array([p[:8] for p in prefixes[:3]], np.int32)
    rows = self_written(target, starts, 24, [0.0, 1.0], seed=0, batch_size=2)
    assert (rows[:, :8] == starts).all()
    from mlx_lm.generate import generate_step

    for r in (0, 2):  # temperature 0
        assert rows[r, 8:].tolist() == [t for t, _ in generate_step(mx.array(starts[r]), model, max_tokens=16)]


def training_setting():
    target = Target(make_model())
    config = DrafterConfig(97, 32, 32, 1)
    rows = self_written(target, np.arange(40, dtype=np.int32)[:, None] % 97, 24, [0.0], seed=0)
    return target, new_drafter(target, config, 0), rows


def test_training_teaches(tmp_path):
    """If this fails, training costs time and drafts do not get better."""
    target, drafter, rows = training_setting()
    prompts = [row[:3].tolist() for row in rows[:6]]
    before = acceptance_length(target, drafter, prompts, DraftShape(4, 5, 12), 20)
    train(target, drafter, rows, TrainingPlan(iters=240, batch_size=8, save_every=240), tmp_path)
    after = acceptance_length(target, drafter, prompts, DraftShape(4, 5, 12), 20)
    assert after > before + 0.4
    lines = [json.loads(line) for line in (tmp_path / "training" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5 and len(lines) == 24


def test_resuming_gives_the_same_weights(tmp_path):
    """If this fails, an interrupted run ends somewhere else than a quiet one."""
    quiet, stopped = tmp_path / "quiet", tmp_path / "stopped"
    target, drafter, rows = training_setting()
    plan = TrainingPlan(iters=12, batch_size=4, save_every=5, warm_up=3)
    train(target, drafter, rows, plan, quiet)

    class Stop(Exception):
        pass

    target, drafter, rows = training_setting()
    real, calls = target.forward, []

    def stopping(tokens, cache):
        calls.append(1)
        if len(calls) == 8:
            raise Stop
        return real(tokens, cache)

    target.forward = stopping
    with pytest.raises(Stop):
        train(target, drafter, rows, plan, stopped)
    target, drafter, rows = training_setting()
    train(target, drafter, rows, plan, stopped, resume=True)
    for (name, a), (_, b) in zip(
        tree_flatten(load_drafter(quiet).parameters()), tree_flatten(load_drafter(stopped).parameters()), strict=True
    ):
        assert mx.array_equal(a, b), name


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(tmp_path):
    target, drafter, rows = training_setting()
    train(target, drafter, rows, TrainingPlan(iters=5, batch_size=4, save_every=5), tmp_path)
    good = (tmp_path / "training" / "checkpoint.safetensors").read_bytes()
    drafter.unfreeze()
    plan = TrainingPlan(iters=10, batch_size=4, learning_rate=float("inf"), save_every=1000)
    with pytest.raises(UserError, match="holds the last good weights; try a --learning-rate below inf"):
        train(target, drafter, rows, plan, tmp_path, resume=True)
    assert (tmp_path / "training" / "checkpoint.safetensors").read_bytes() == good


def test_command(stories, tmp_path, capsys):
    """If this fails, `mlx-redrafter train` does not give a drafter that generates."""
    out = tmp_path / "drafter"
    flags = ["--rows", "60", "--row-length", "40", "--iters", "30", "--batch-size", "8", "--prefix-length", "8"]
    assert main(["train", "--model", str(stories), "--out", str(out), *flags]) == 0
    assert "mean acceptance length" in capsys.readouterr().out
    result = json.loads((out / "training" / "result.json").read_text())
    assert result["mean_acceptance_length"] > 1.1
    assert load_drafter(out).lm_head.weight.dtype == mx.bfloat16
    generate = [
        "generate",
        "--model",
        str(stories),
        "-p",
        "Once upon a time",
        "-m",
        "40",
        "--beam-width",
        "4",
        "--json",
    ]
    assert main([*generate, "--draft", str(out)]) == 0
    drafted = json.loads(capsys.readouterr().out)
    assert drafted["method"] == "redrafter" and drafted["mean_acceptance_length"] > 1.1
    assert main([*generate, "--draft", "none"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == drafted["tokens"]
    assert main(["train", "--model", str(stories), "--out", str(out), *flags]) == 2
    assert "already exists" in capsys.readouterr().err
