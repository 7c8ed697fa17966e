"""Readings that trainings share are what each would have read alone."""

import numpy as np
import pytest
from mlx_redrafter.benchmarks.ablation.readings import View, read_all
from support.rows import VOCAB, random_rows, teacher_of

from mlx_redrafter import UserError
from mlx_redrafter.target.model import Target
from mlx_redrafter.training.loss import Objective

TOP = Objective(top_k=8)


@pytest.fixture
def shared(small_model, tmp_path):
    """A teacher of both layers of a target, and its rows."""
    rows = random_rows(5)
    return teacher_of(Target(small_model), rows, tmp_path / "shared", TOP, budget=10**6, layers=(1, 2)), rows


def test_a_view_is_a_teacher_of_its_own(shared, small_model, tmp_path):
    """If this fails, a recipe learns from other hidden states or labels than it would alone."""
    teacher, rows = shared
    picks = np.array([4, 0, 2])
    read_all(teacher, picks, 10**6)
    for layers in ((), (1,), (1, 2)):
        view = View(teacher, picks, TOP, layers, None, None)
        alone = teacher_of(teacher.target, rows, tmp_path / str(layers), TOP, layers=layers)
        tokens, found = view.read(np.array([2, 0]))
        expected, of = alone.read(np.array([2, 4]))
        assert (tokens == expected).all() and len(view) == 3 and view.rows.length == rows.shape[1]
        assert all((found[name] == of[name]).all() for name in ("hidden", "ids", "shares", "mass"))


def test_other_vocabularies(shared, tmp_path):
    """If this fails, a drafter of another vocabulary learns other tokens than the target's."""
    _, rows = shared
    some = np.sort(np.random.default_rng(0).permutation(VOCAB)[:40])
    target = shared[0].target
    whole = View(teacher_of(target, rows, tmp_path / "a", TOP, some), np.arange(5), TOP, (), None, some)
    found = whole.read(np.array([1]))[1]
    assert np.isin(found["ids"], some).all() and whole.size == VOCAB
    assert np.allclose(found["shares"].sum(-1), 1, atol=1e-2)
    everything = Objective(top_k=VOCAB - 1)
    part = View(teacher_of(target, rows, tmp_path / "b", everything), np.arange(5), TOP, (), some, None)
    of = teacher_of(target, rows, tmp_path / "c", Objective(top_k=0), some).read(np.array([1]))[1]
    found = part.read(np.array([1]))[1]
    assert np.allclose(found["mass"], of["mass"], atol=2e-2)
    dense = np.zeros((rows.shape[1], 40))
    for i, (ids, shares) in enumerate(zip(found["ids"][0], found["shares"][0], strict=True)):
        np.add.at(dense[i], ids, shares)
    assert np.allclose(dense, of["shares"][0], atol=2e-2)


def test_readings_of_another_target_are_refused(shared, tmp_path):
    """If this fails, drafters are trained on what another model said."""
    from support import make_model

    teacher, rows = shared
    read_all(teacher, np.arange(3), 10**6)
    read_all(teacher, np.arange(5), 10**6)
    assert all(teacher.holds(row) for row in range(5))
    teacher.close()
    other = teacher_of(Target(make_model(seed=1)), rows, tmp_path / "shared", TOP, budget=10**6, layers=(1, 2))
    with pytest.raises(UserError, match="are of another target or text"):
        read_all(other, np.arange(5), 10**6)
    with pytest.raises(UserError, match=r"--rows 5: .* 1 rows would fit"):
        read_all(other, np.arange(5), other.record.itemsize)
