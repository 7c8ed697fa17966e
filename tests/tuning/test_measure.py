"""What steps cost is measured through the real parts."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from support import make_drafter, make_model

from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import CHAIN
from mlx_redrafter.tuning.measure import LENGTHS, LONG_ROWS, ROWS, WIDTHS, measure


def ticking():
    """A clock that goes on by one second a look."""
    ticks = iter(range(10**6))
    return lambda: float(next(ticks))


def test_measured_through_the_real_parts(small_model):
    """Every table is filled, with the time that passed, and nothing of the models is changed."""
    before = {name: mx.array(weight) for name, weight in tree_flatten(small_model.parameters())}
    costs = measure(verifier_of(small_model), make_drafter(), seconds=0)
    assert list(costs.verify) == [128, 448] and list(costs.plain) == [128, 448]  # of a context of 512
    assert list(costs.verify[128]) == list(ROWS) and list(costs.verify[448]) == list(LONG_ROWS)
    assert {w: list(t) for w, t in costs.draft.items()} == {w: list(LENGTHS) for w in WIDTHS}
    assert all(0 < s < 5 for table in costs.verify.values() for s in table.values())
    assert all(mx.array_equal(before[name], weight) for name, weight in tree_flatten(small_model.parameters()))


def test_by_the_clock(small_model):
    """If this fails, a time counts for two steps where it was one, or the slowest round counts."""
    by_clock = measure(verifier_of(small_model), make_drafter(), seconds=0, clock=ticking())
    assert by_clock.verify[128][1] == by_clock.plain[128] == 0.5 and by_clock.draft[4][5] == 0


def test_without_a_drafter(small_model):
    """If this fails, lookup alone cannot know what its rows cost."""
    costs = measure(verifier_of(small_model), None, seconds=0, clock=ticking())
    assert costs.draft == {} and list(costs.verify[128]) == list(ROWS) and costs.plain[448] == 0.5


def test_a_target_that_takes_chains_only(small_model):
    """If this fails, trees are measured that the target cannot verify."""
    verifier = verifier_of(small_model)
    verifier.capability = CHAIN
    assert list(measure(verifier, make_drafter(), seconds=0, clock=ticking()).draft) == [1]


def test_a_target_with_windows():
    """If this fails, costs behind a window cannot be measured."""
    model = make_model(layer_types=["sliding_attention", "full_attention"], sliding_window=24)
    verifier = verifier_of(model)
    assert verifier.capability == "tree" and not verifier.make_cache().can_rewind
    costs = measure(verifier, make_drafter(), seconds=0)
    assert list(costs.verify) == [128] and all(seconds > 0 for seconds in costs.verify[128].values())
    assert costs.plain[128] > 0


def test_rounds_go_on_until_the_time_is_over(small_model, monkeypatch):
    """If this fails, a single disturbed round decides, or measuring never ends."""
    runs = []
    monkeypatch.setattr("mlx_redrafter.tuning.measure.ROWS", (1, 4))
    monkeypatch.setattr("mlx_redrafter.tuning.measure.LONG_ROWS", (1,))
    monkeypatch.setattr("mlx_redrafter.tuning.measure._steps", lambda *_: lambda: runs.append(0) or float(len(runs)))
    costs = measure(verifier_of(small_model), None, seconds=40, clock=ticking())
    assert len(runs) > 4 and costs.plain[128] == 3.0  # the first of those that count, after one that does not
    with pytest.raises(KeyError):
        costs.verify[128][32]
