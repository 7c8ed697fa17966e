"""Training: what it learns, going on after a stop, early stop, what stops it."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from support import make_model
from support.rows import VOCAB, teacher_of
from support.training import differing

from mlx_redrafter import UserError
from mlx_redrafter.drafting.redrafter import DrafterConfig
from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.target.model import Target
from mlx_redrafter.training.acceptance_length import acceptance_length
from mlx_redrafter.training.drafters.init_weights import new_drafter
from mlx_redrafter.training.drafters.redrafter import ReDrafter
from mlx_redrafter.training.trainer import TrainingPlan, row_picks, train


def test_every_row_is_read_once_per_pass():
    plan = TrainingPlan(batch_size=4, seed=3)
    picks = np.concatenate([row_picks(plan, i, 10) for i in range(5)])
    assert sorted(picks[:10]) == sorted(picks[10:]) == list(range(10))
    assert list(picks[:10]) != list(picks[10:])


@pytest.fixture(scope="module")
def learnable():
    """Greedy text of a small model: (target, rows)."""
    model = make_model()
    rows = []
    for first in range(40):
        said = [t for t, _ in generate_step(mx.array([first * 2 % VOCAB]), model, max_tokens=23)]
        rows.append([first * 2 % VOCAB, *said])
    return Target(model), np.array(rows, np.int32)


def run(learnable, folder, plan, resume=False, blocks=1, evaluate=None, budget=10**9, **config):
    target, rows = learnable
    drafter = new_drafter(target, DrafterConfig(VOCAB, 32, 32, blocks, **config), 0)
    teacher = teacher_of(target, rows, folder / "teacher", plan.objective, budget=budget)
    result = train(ReDrafter(), drafter, teacher, plan, folder, resume, evaluate)
    return drafter, result


def test_training_teaches(learnable, tmp_path):
    """If this fails, training costs time and drafts do not get better."""
    target, rows = learnable
    prompts = [row[:3].tolist() for row in rows[:6]]
    fresh = new_drafter(target, DrafterConfig(VOCAB, 32, 32, 1), 0)
    before = acceptance_length(target, fresh, prompts, DraftShape(4, 5, 12), 20)
    mx.reset_peak_memory()
    drafter, result = run(
        learnable, tmp_path, TrainingPlan(iters=240, batch_size=8, learning_rate=4e-3, save_every=120)
    )
    assert acceptance_length(target, drafter, prompts, DraftShape(4, 5, 12), 20) > before + 0.4
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5 and len(lines) == 24
    # What updates kept would add up: a thousandth of the weights each would show.
    assert lines[-1]["peak_memory_gb"] <= lines[4]["peak_memory_gb"] * 1.02
    assert result.updates == 240 and result.best is None and result.positions_per_second > 0


# Of the readings 40 kB keep some rows; the others are all and none.
@pytest.mark.parametrize(
    ("budget", "dropout"), [(40_000, 0.2), *(pytest.param(n, 0, marks=pytest.mark.slow) for n in (10**9, 0))]
)
def test_resuming_gives_the_same_weights(learnable, tmp_path, budget, dropout):
    """If this fails, an interrupted run ends somewhere else than a quiet one."""
    plan = TrainingPlan(iters=25, batch_size=4, save_every=5, eval_every=10, warm_up=3, dropout=dropout)

    def evaluate(drafter):
        return mx.sum(drafter.rnn_u.bias).item()

    quiet, expected = run(learnable, tmp_path / "quiet", plan, evaluate=evaluate, budget=budget)

    class Stop(Exception):
        pass

    real, calls = Target.forward, []

    def stopping(self, tokens, *args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise Stop
        return real(self, tokens, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Target, "forward", stopping)
        run(learnable, tmp_path / "stopped", plan, evaluate=evaluate, budget=budget)
    assert calls
    stopped, found = run(learnable, tmp_path / "stopped", plan, resume=True, evaluate=evaluate, budget=budget)
    assert not differing(quiet, stopped)
    assert (found.best, found.best_at) == (expected.best, expected.best_at)
    names = ("iter", "loss", "hits")
    logs = [
        [[json.loads(line)[name] for name in names] for line in (tmp_path / kind / "log.jsonl").open()]
        for kind in ("quiet", "stopped")
    ]
    assert logs[0] == logs[1]


def test_parts_of_a_batch_add_up(learnable, tmp_path):
    """If this fails, --grad-accumulation changes what is learned."""
    plans = [TrainingPlan(iters=6, batch_size=8, grad_accumulation=n, learning_rate=1e-3) for n in (1, 4)]
    whole, parts = (run(learnable, tmp_path / str(p.grad_accumulation), p)[0] for p in plans)
    for (name, a), (_, b) in zip(tree_flatten(whole.parameters()), tree_flatten(parts.parameters()), strict=True):
        assert mx.allclose(a, b, atol=2e-4), name
    with pytest.raises(UserError, match="--batch-size is 8, expected a multiple of 3"):
        run(learnable, tmp_path / "3", TrainingPlan(batch_size=8, grad_accumulation=3))


def test_early_stop_keeps_the_best(learnable, tmp_path):
    """If this fails, a run goes on for nothing, or ends with worse weights than it has seen."""
    scores = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    seen = []

    def evaluate(drafter):
        seen.append(mx.array(drafter.lm_head.weight))
        return next(scores)

    plan = TrainingPlan(iters=100, batch_size=4, eval_every=5, patience=2)
    drafter, result = run(learnable, tmp_path, plan, evaluate=evaluate)
    assert (result.updates, result.best, result.best_at) == (20, 3.0, 10)
    assert mx.array_equal(drafter.lm_head.weight, seen[1])
    again, _ = run(learnable, tmp_path, plan, resume=True, evaluate=evaluate)  # it is over: nothing more happens
    assert not differing(drafter, again)


@pytest.mark.parametrize("change", [{"quantization": {"group_size": 32, "bits": 4}}, {"dtype": mx.bfloat16}])
def test_other_precisions_learn_and_keep_float32_weights(learnable, tmp_path, change):
    plan = TrainingPlan(iters=60, batch_size=8, **change)
    drafter, _ = run(learnable, tmp_path, plan)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert drafter.lm_head.weight.dtype == mx.float32


@pytest.mark.slow
def test_compiled_steps_learn_the_same(learnable, tmp_path):
    """If this fails, mx.compile changes what is learned. (On a CPU it calls g++, which takes a while.)"""
    plain, _ = run(learnable, tmp_path / "off", TrainingPlan(iters=8, batch_size=8, compile="off"))
    compiled, _ = run(learnable, tmp_path / "on", TrainingPlan(iters=8, batch_size=8, compile="on"))
    for (name, a), (_, b) in zip(tree_flatten(plain.parameters()), tree_flatten(compiled.parameters()), strict=True):
        assert mx.allclose(a, b, atol=1e-5), name


def test_a_full_disk_under_the_log(learnable, tmp_path):
    """If this fails, a disk that fills up in mid-training ends in a traceback."""
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"log.jsonl: cannot be written \(No space left on device\)"):
        run(learnable, tmp_path, TrainingPlan(iters=10, batch_size=4))


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(learnable, tmp_path):
    run(learnable, tmp_path, TrainingPlan(iters=5, batch_size=4, save_every=5))
    good = (tmp_path / "checkpoint.safetensors").read_bytes()
    plan = TrainingPlan(iters=10, batch_size=4, learning_rate=float("inf"), save_every=1000)
    with pytest.raises(UserError, match="holds the last good weights; try a --learning-rate below inf"):
        run(learnable, tmp_path, plan, resume=True)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == good
    with pytest.raises(UserError, match=r"not of this drafter: tensor 'blocks.1"):
        run(learnable, tmp_path, plan, resume=True, blocks=2)
