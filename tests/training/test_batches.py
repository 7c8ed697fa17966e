"""Batches: which contexts, tokens and labels an update learns from."""

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from support import make_drafter, make_model
from support.rows import VOCAB, TextRows, random_rows, teacher_of

from mlx_redrafter.target.model import Target
from mlx_redrafter.target.output_layer import rows_of
from mlx_redrafter.training.batches import BatchMaker, thinned
from mlx_redrafter.training.drafters.redrafter import ReDrafter
from mlx_redrafter.training.loss import Objective, distillation_loss

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
    layers = (1, 2) if name == "hard" else ()
    drafter = make_drafter(draft_vocab_size=None if vocab_map is None else len(vocab_map), context_layers=layers)
    allowed = np.arange(VOCAB) if vocab_map is None else vocab_map
    rows = random_rows()
    teacher = teacher_of(target, rows, tmp_path, objective, vocab_map, layers=layers)
    batch = BatchMaker(teacher, seed=0)(np.array([0, 1]), 0)
    loss, hits = distillation_loss(ReDrafter().scores(drafter, batch), batch, weights)
    expected, right = np.zeros(steps), np.zeros(steps)
    for b in range(2):
        tokens = mx.array(rows[b : b + 1])
        for t in range(12 - steps - 1):
            hidden, _ = target.forward(tokens[:, : t + 1], [None, None], context_layers=layers)
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


def test_prompts_are_learned_where_asked_for(tmp_path):
    """If this fails, half of a text teaches nothing, or what all rows begin with is learned again and again."""
    tokens, counts = random_rows(3, 20), np.zeros((3, 20), bool)
    tokens[:, :4] = [1, 2, 3, 4]
    tokens[:, 4] = [5, 6, 7]
    counts[:, 12:16] = True
    objective = Objective(step_weights=(1, 1), step_shares=(1, 1), prompts=True)
    make = BatchMaker(teacher_of(Target(make_model()), TextRows(tokens, counts), tmp_path, objective), seed=0)
    batch = make(np.array([0, 2]), 0)
    assert batch.counts.tolist() == [24, 22]  # tokens 4 to 15 of both rows; of pairs one less
    alone = dataclasses.replace(objective, prompts=False)
    make = BatchMaker(teacher_of(Target(make_model()), TextRows(tokens, counts), tmp_path / "b", alone), seed=0)
    assert make(np.array([0, 2]), 0).counts.tolist() == [8, 6]


def test_candidates_stand_for_the_vocabulary(tmp_path):
    """If this fails, a label is learned as another token, or the loss is over tokens that nobody named."""
    target, rows = Target(make_model()), random_rows(2)
    objective = Objective(top_k=3, step_weights=(1, 1), step_shares=(1, 1))
    few = dataclasses.replace(objective, candidates=60)
    whole = BatchMaker(teacher_of(target, rows, tmp_path / "a", objective), seed=0)(np.array([0, 1]), 7)
    batch = BatchMaker(teacher_of(target, rows, tmp_path / "b", few), seed=0)(np.array([0, 1]), 7)
    [candidates] = batch.candidates
    assert len(set(candidates.tolist())) == 60
    drafter = make_drafter()
    at = mx.array(np.random.default_rng(0).normal(size=(len(whole.hidden), 32)), mx.float32)
    for k in range(2):
        assert mx.array_equal(candidates[batch.ids[k]], whole.ids[k]) and mx.array_equal(
            batch.shares[k], whole.shares[k]
        )
        given, all_of_them = drafter.features(at, at) @ rows_of(drafter.lm_head, candidates).T, drafter.logits(at, at)
        assert np.allclose(given, all_of_them[:, candidates], atol=1e-4)
    named = np.unique(np.concatenate([np.array(part).reshape(-1) for part in whole.ids]))
    scarce = dataclasses.replace(objective, candidates=len(named) // 2)
    batch = BatchMaker(teacher_of(target, rows, tmp_path / "c", scarce), seed=0)(np.array([0, 1]), 7)
    for k in range(2):  # what found no room has no share
        there = np.isin(np.array(whole.ids[k]), np.array(batch.candidates[0]))
        assert (np.array(batch.shares[k]) == np.where(there, np.array(whole.shares[k]), 0)).all() and not there.all()


def test_dropout_leaves_out_a_share_of_what_is_read_and_nothing_of_what_is_learned(tmp_path):
    """If this fails, dropout shifts what the head reads, changes labels, or differs when a run goes on."""
    teacher = teacher_of(Target(make_model()), random_rows(), tmp_path, Objective(top_k=5))
    batch = BatchMaker(teacher, seed=0, whole=True)(np.array([0, 1]), 0)
    assert thinned(batch, 0, (0, 0, 0)) is batch
    thin, again, other = (thinned(batch, 0.25, (0, update, 0)) for update in (3, 3, 4))
    parts = ("hidden", "embeddings", "whole")
    pairs = [(a, b) for name in parts for a, b in zip([*getattr(batch, name)], [*getattr(thin, name)])]
    numbers = np.concatenate([np.array(b).reshape(-1) for a, b in pairs if a.dtype == mx.float32])
    before = np.concatenate([np.array(a).reshape(-1) for a, b in pairs if a.dtype == mx.float32])
    np.testing.assert_allclose(numbers[numbers != 0], before[numbers != 0] / 0.75, rtol=1e-6)
    assert np.mean(numbers == 0) == pytest.approx(0.25, abs=0.02)
    assert mx.array_equal(thin.whole[2], batch.whole[2]) and thin.ids is batch.ids and thin.shares is batch.shares
    assert mx.array_equal(thin.hidden, again.hidden) and not mx.array_equal(thin.hidden, other.hidden)
