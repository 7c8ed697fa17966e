"""Static trees: the published one, those that fit what heads say, and what configs may hold."""

import mlx.core as mx
import numpy as np
import pytest
from support import make_model, plainly
from support.medusa import PROMPT, knowing, make_heads, steps_of

from mlx_redrafter import DraftShape, UserError
from mlx_redrafter.drafting.medusa_tree import (
    PUBLISHED,
    check_choices,
    fit_choices,
    parents_of,
    rank_accuracies,
    select,
)
from mlx_redrafter.target.model import Target


def test_the_published_tree():
    assert len(PUBLISHED) == 63 and len(set(PUBLISHED)) == 63
    assert [sum(len(c) == depth for c in PUBLISHED) for depth in (1, 2, 3, 4)] == [10, 28, 23, 2]
    for count in range(1, 64):
        parents_of(PUBLISHED[:count])  # every beginning of it is a tree
    assert {c for c in PUBLISHED if max(c) < 2} == set(select(PUBLISHED, 2, 4, 63))


def test_a_fitted_tree_is_the_best_one():
    """If this fails, the tree is not the one that calibration data calls for."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        accuracies = [np.sort(rng.dirichlet([0.3] * 4))[::-1].tolist() for _ in range(3)]
        every = {}
        for depth in (1, 2, 3):
            for index in np.ndindex(*[4] * depth):
                every[index] = float(np.prod([accuracies[k][r] for k, r in enumerate(index)]))
        for count in (1, 5, 20, 200):
            choices = fit_choices(accuracies, count)
            best = sorted(every.values(), reverse=True)[:count]
            assert len(choices) == len(set(choices)) == min(count, len(every))
            assert np.isclose(sum(every[c] for c in choices), sum(best))
            parents_of(choices)


def test_accuracies_are_counted():
    """If this fails, a tree is fitted to what heads say about other places."""
    model = make_model()
    heads = make_heads(heads=2, layers=0)
    rows = [PROMPT * 3, PROMPT, [1, 2, 3]]  # the last is too short to say anything
    found = rank_accuracies(Target(model), heads, rows, ranks=4)
    hits, seen = np.zeros((2, 4)), 0
    for row in rows[:2]:
        hidden, _ = Target(model).forward(mx.array([row]), [None] * 2)
        for place in range(len(row) - 3):
            ranked = np.argsort(-np.array(heads(hidden[0, place])), axis=-1)
            seen += 1
            for k in range(2):
                hits[k] += ranked[k, :4] == row[place + k + 2]
    assert hits.sum() > 0 and np.allclose(found, hits / seen)
    with pytest.raises(UserError, match="no text has more than 3 tokens, which 2 heads need"):
        rank_accuracies(Target(model), heads, rows[2:])


def test_a_fitted_tree_is_accepted_further_than_a_wrong_one():
    """If this fails, accuracies and choices do not speak of the same heads and ranks."""
    model = make_model()
    text = plainly(model, PROMPT, 60)
    heads = knowing(make_heads(), model, PROMPT + text[:30])
    accuracies = rank_accuracies(Target(model), heads, [PROMPT + text])
    lengths = []
    for table in (accuracies, [row[::-1] for row in accuracies]):
        heads.config.medusa_choices = fit_choices(table, 6)
        lengths.append(60 / len(steps_of(model, heads, DraftShape(10, 5, 6), 60)))
    assert lengths[0] > lengths[1] + 0.2


def test_choices_are_checked():
    assert check_choices([[0], [0, 3]], 2, "x") == ((0,), (0, 3))
