"""Training: the loss, what it learns, and going on after a stop."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from support import make_drafter, make_model

from mlx_redrafter import UserError
from mlx_redrafter.drafting.redrafter import DrafterConfig
from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.target.model import Target
from mlx_redrafter.training.acceptance_length import acceptance_length
from mlx_redrafter.training.batches import BatchMaker
from mlx_redrafter.training.drafters.init_weights import new_drafter
from mlx_redrafter.training.drafters.redrafter import ReDrafter
from mlx_redrafter.training.loss import Objective, dense_cross_entropy, distillation_loss, soft_cross_entropy
from mlx_redrafter.training.row_cache import RowCache
from mlx_redrafter.training.teacher import Teacher
from mlx_redrafter.training.trainer import TrainingPlan, row_picks, train
from mlx_redrafter.training.update import rounded

VOCAB = 97


class TextRows:
    """Rows in memory, all of them to be learned unless told otherwise."""

    held_out = 0

    def __init__(self, tokens, counts=None):
        self.tokens, self.length = np.asarray(tokens, np.int32), tokens.shape[1]
        self.counts = np.ones(tokens.shape, bool) if counts is None else counts

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, picks):
        return self.tokens[picks], self.counts[picks]


def random_rows(count=2, length=12, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (count, length)).astype(np.int32)


def teacher_of(target, rows, folder, objective=None, vocab_map=None, budget=0):
    rows = rows if isinstance(rows, TextRows) else TextRows(rows)
    return Teacher(target, rows, objective or Objective(), vocab_map, folder, budget)


@pytest.mark.parametrize("dense", [False, True])
def test_cross_entropy_and_its_gradient(dense):
    """If this fails, training walks in a wrong direction."""
    mx.random.seed(0)
    logits = mx.random.normal((5, 50)) * 4
    ids = mx.array(np.stack([np.random.default_rng(i).permutation(50)[:3] for i in range(5)]))
    shares = mx.softmax(mx.random.normal((5, 3)), axis=-1)
    everywhere = mx.put_along_axis(mx.zeros((5, 50)), ids, shares, axis=-1)
    weights = mx.arange(1.0, 6.0)

    def ours(x):
        found = dense_cross_entropy(x, everywhere) if dense else soft_cross_entropy(x, ids, shares)
        return mx.sum(weights * found)

    def written_out(x):
        return -mx.sum(weights * mx.sum(everywhere * nn.log_softmax(x), axis=-1))

    assert ours(logits).item() == pytest.approx(written_out(logits).item(), rel=1e-5)
    assert mx.abs(mx.grad(ours)(logits) - mx.grad(written_out)(logits)).max().item() < 1e-5


OBJECTIVES = {
    "everything": (Objective(top_k=0), None),
    "most probable": (Objective(top_k=5), None),
    "draft vocabulary": (Objective(top_k=0), np.arange(10, 40)),
    "most probable of a draft vocabulary, colder": (Objective(top_k=4, temperature=0.5), np.arange(10, 40)),
    "hard": (Objective(labels="hard"), np.arange(10, 40)),
    "text": (Objective(labels="text"), np.arange(10, 40)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_reads_what_decoding_will_read(name, tmp_path):
    """If this fails, the head is trained on a context, tokens or labels shifted by one, or on others than asked for."""
    objective, vocab_map = OBJECTIVES[name]
    weights, steps = (1.0, 0.5, 0.25), 3
    objective = Objective(objective.labels, objective.top_k, objective.temperature, weights, (1.0, 1.0, 1.0))
    target = Target(make_model())
    drafter = make_drafter(draft_vocab_size=None if vocab_map is None else len(vocab_map))
    allowed = np.arange(VOCAB) if vocab_map is None else vocab_map
    rows = random_rows()
    batch = BatchMaker(teacher_of(target, rows, tmp_path, objective, vocab_map), seed=0)(np.array([0, 1]), 0)
    loss, hits = distillation_loss(ReDrafter().scores(drafter, batch), batch, weights)
    expected, right = np.zeros(steps), np.zeros(steps)
    for b in range(2):
        tokens = mx.array(rows[b : b + 1])
        for t in range(12 - steps - 1):
            hidden, _ = target.forward(tokens[:, : t + 1], [None, None])
            state = None
            for k in range(1, steps + 1):
                state = drafter.advance(target.embed(tokens[0, t + k]), state)
                context = drafter.project_context(hidden[0, -1].astype(mx.bfloat16).astype(mx.float32))
                guess = np.array(nn.log_softmax(drafter.logits(context, state)))
                said = np.array(target.forward(tokens[:, : t + k + 1], [None, None])[1][0, -1])
                label = np.zeros(VOCAB)
                if objective.labels == "text":
                    label[rows[b, t + k + 1]] = 1
                elif objective.labels == "hard":
                    label[said.argmax()] = 1
                else:
                    label = np.exp(said / objective.temperature)
                    label /= label.sum()
                inside = label[allowed]
                mass = inside.sum()
                if objective.labels == "kl" and objective.top_k:
                    inside = np.where(inside >= np.sort(inside)[-objective.top_k], inside, 0)
                if mass > 0:
                    expected[k - 1] -= mass * (inside / inside.sum()) @ guess / 16
                    right[k - 1] += mass * (guess.argmax() == inside.argmax()) / 16
    assert loss.item() == pytest.approx(float(expected @ weights) / sum(weights), rel=3e-3)
    assert np.allclose(hits, right, atol=2e-3)


def test_only_what_counts_is_learned(tmp_path):
    """If this fails, a drafter learns to guess what the user says, or across two documents."""
    counts = np.ones((2, 12), bool)
    counts[0, 5:] = False
    counts[1, 6] = False
    rows = TextRows(random_rows(), counts)
    teacher = teacher_of(Target(make_model()), rows, tmp_path, Objective(step_weights=(1, 1, 1), step_shares=(1, 1, 1)))
    make = BatchMaker(teacher, seed=0)
    batch = make(np.array([0, 1]), 0)
    learned = [set(), set(), set()]
    for b in range(2):
        order, weights = make._choose(counts[b], 0, b)
        for i, t in enumerate(order):
            for k in range(3):
                if weights[k, i]:
                    learned[k].add((b, int(t)))
                    assert counts[b, t + 2 : t + k + 3].all()
    assert [len(found) for found in learned] == [10, 8, 6] == batch.counts.tolist()
    assert [int(w.sum().item()) for w in batch.weights] == [10, 8, 6]


def test_shares_of_positions_nest(tmp_path):
    """If this fails, a deeper step reads states of other positions."""
    objective = Objective(step_weights=(1, 1, 1), step_shares=(1, 0.5, 0.25))
    target, rows = Target(make_model()), random_rows(3, 20)
    make = BatchMaker(teacher_of(target, rows, tmp_path, objective), seed=1)
    batch = make(np.arange(3), 5)
    assert [len(w) for w in batch.weights] == [48, 24, 12]
    order = np.stack([make._choose(np.ones(20, bool), 5, b)[0] for b in range(3)]).T.reshape(-1)
    for k, n in enumerate((48, 24, 12)):
        expected = target.embed(mx.array(rows[np.tile(np.arange(3), 16)[:n], order[:n] + k + 1]))
        assert mx.array_equal(batch.embeddings[k], expected)
    parts = [make(np.arange(3), 5, slice(i, i + 1)) for i in range(3)]
    assert sum(len(p.weights[2]) for p in parts) == 12
    assert mx.array_equal(parts[0].counts, batch.counts)  # the mean is over the whole batch


def test_teacher_reads_a_row_once(tmp_path, monkeypatch):
    """If this fails, the byte budget buys nothing, is overrun, or a kept row differs from a read one."""
    target, rows = Target(make_model()), random_rows(6)
    read, real = [], target.forward
    monkeypatch.setattr(target, "forward", lambda tokens, cache: read.append(tokens.shape[0]) or real(tokens, cache))
    reader = teacher_of(target, rows, tmp_path / "a", budget=10**9)
    first = reader.read(np.array([0, 1, 2]))[1]
    again = reader.read(np.array([2, 1]))[1]
    assert read == [3]
    assert (first.hidden[1] == again.hidden[1]).all() and (first.ids[2] == again.ids[0]).all()
    reader.close()
    later = teacher_of(target, rows, tmp_path / "a", budget=10**9).read(np.array([2, 1]))[1]
    assert read == [3] and (later.shares == again.shares).all()
    read.clear()
    scarce = teacher_of(target, rows, tmp_path / "b", budget=0)
    for _ in range(2):
        scarce.read(np.array([0, 1]))
    assert read == [2, 2] and (tmp_path / "b" / "records.bin").stat().st_size == 0


def test_row_cache_keeps_whole_records_only(tmp_path):
    """If this fails, a killed run learns from half a record when it goes on."""
    cache = RowCache(tmp_path, 4, budget=11)
    for row in (7, 3, 5):
        cache.put(row, bytes([row] * 4))
    assert cache.get(7) == b"\7" * 4 and cache.get(5) is None  # 11 bytes have room for two
    cache.close()
    with (tmp_path / "records.bin").open("ab") as file:
        file.write(b"\x09\x09")  # killed in the middle of a record
    with (tmp_path / "index.bin").open("ab") as file:
        file.write(b"\x09")
    again = RowCache(tmp_path, 4, budget=100)
    assert again.get(9) is None and again.get(3) == b"\3" * 4
    again.put(9, b"\x09" * 4)
    assert again.get(9) == b"\x09" * 4 and again.get(7) == b"\7" * 4


def test_row_cache_on_a_full_disk(tmp_path):
    """If this fails, a full disk ends a run that could go on without the cache."""
    cache = RowCache(tmp_path, 4, budget=100)
    cache.put(1, b"aaaa")
    real = cache._records

    class Full:
        def write(self, data):
            real.write(data[:2])
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(real, name)

    cache._records = Full()
    cache.put(2, b"bbbb")
    cache._records = real
    assert cache.get(2) is None and cache.get(1) == b"aaaa"
    cache.close()
    assert RowCache(tmp_path, 4, 100).get(1) == b"aaaa" and (tmp_path / "records.bin").stat().st_size == 4


def test_every_row_is_read_once_per_pass():
    plan = TrainingPlan(batch_size=4, seed=3)
    picks = np.concatenate([row_picks(plan, i, 10) for i in range(5)])
    assert sorted(picks[:10]) == sorted(picks[10:]) == list(range(10))
    assert list(picks[:10]) != list(picks[10:])


def test_rounding_for_quantisation_passes_gradients():
    """If this fails, training for 4 bits learns nothing, or trains for other weights than are stored."""
    mx.random.seed(0)
    weight, x = mx.random.normal((8, 64)), mx.random.normal((64,))
    quantised = nn.QuantizedLinear.from_linear(_linear(weight), 32, 4)
    assert mx.abs(rounded(weight, 32, 4) @ x - quantised(x)).max().item() < 1e-4
    gradient = mx.grad(lambda w: mx.sum(rounded(w, 32, 4) @ x))(weight)
    assert mx.allclose(gradient, mx.broadcast_to(x, (8, 64)))


def _linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = weight
    return layer


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


def same(a, b):
    return all(
        mx.array_equal(x, y)
        for (_, x), (_, y) in zip(tree_flatten(a.parameters()), tree_flatten(b.parameters()), strict=True)
    )


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


@pytest.mark.parametrize("budget", [10**9, 40_000, 0])
def test_resuming_gives_the_same_weights(learnable, tmp_path, budget):
    """If this fails, an interrupted run ends somewhere else than a quiet one."""
    plan = TrainingPlan(iters=25, batch_size=4, save_every=5, eval_every=10, warm_up=3)

    def evaluate(drafter):
        return mx.sum(drafter.rnn_u.bias).item()

    quiet, expected = run(learnable, tmp_path / "quiet", plan, evaluate=evaluate, budget=budget)

    class Stop(Exception):
        pass

    real, calls = Target.forward, []

    def stopping(self, tokens, cache):
        calls.append(1)
        if len(calls) == 8:
            raise Stop
        return real(self, tokens, cache)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Target, "forward", stopping)
        run(learnable, tmp_path / "stopped", plan, evaluate=evaluate, budget=budget)
    assert calls
    stopped, found = run(learnable, tmp_path / "stopped", plan, resume=True, evaluate=evaluate, budget=budget)
    assert same(quiet, stopped)
    assert (found.best, found.best_at) == (expected.best, expected.best_at)
    names = ("iter", "loss", "hits")
    logs = [
        [[json.loads(line)[name] for name in names] for line in (tmp_path / kind / "log.jsonl").open()]
        for kind in ("quiet", "stopped")
    ]
    assert logs[0] == logs[1]


def test_parts_of_a_batch_add_up(learnable, tmp_path):
    """If this fails, --grad-accumulation changes what is learned."""
    plans = [TrainingPlan(iters=6, batch_size=8, accumulate=n, learning_rate=1e-3) for n in (1, 4)]
    whole, parts = (run(learnable, tmp_path / str(p.accumulate), p)[0] for p in plans)
    for (name, a), (_, b) in zip(tree_flatten(whole.parameters()), tree_flatten(parts.parameters()), strict=True):
        assert mx.allclose(a, b, atol=2e-4), name
    with pytest.raises(UserError, match="--batch-size is 8, expected a multiple of 3"):
        run(learnable, tmp_path / "3", TrainingPlan(batch_size=8, accumulate=3))


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
    assert same(drafter, again)


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
