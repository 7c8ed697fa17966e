"""From measured points to the cost of any step."""

import json

import pytest
from support.costs import made_up

from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, LookedUp
from mlx_redrafter.tuning.step_costs import Costs


def test_costs_between_the_points():
    costs = Costs({100: {1: 1.0, 3: 2.0}, 1100: {1: 2.0, 3: 3.0}}, {100: 0.9, 1100: 1.9}, {1: {2: 0.1, 5: 0.4}})
    assert costs.verify_seconds(2, 100) == 1.5 and costs.verify_seconds(9, 0) == 2.0
    assert costs.verify_seconds(1, 600) == pytest.approx(1.5) and costs.verify_seconds(1, 2100) == pytest.approx(3)
    assert costs.step_seconds(PLAIN, 600) == pytest.approx(1.4)
    assert costs.draft_seconds(1, 4) == pytest.approx(0.3) and costs.draft_seconds(6, 7) == pytest.approx(0.6)
    assert costs.step_seconds(Drafted(DraftShape(1, 3, 2)), 100) == pytest.approx(2.0 + 0.2)
    assert costs.step_seconds(Drafted(DraftShape(1, 3, 2), True), 100) == pytest.approx(2.0 + 0.2)


def test_widths_between_those_that_were_measured():
    costs = Costs({100: {1: 1.0}}, {100: 1.0}, {1: {2: 0.1, 5: 0.4}, 5: {2: 0.5, 5: 0.8}})
    assert costs.draft_seconds(3, 2) == pytest.approx(0.3) and costs.draft_seconds(9, 5) == pytest.approx(0.8)


def test_a_lookup_costs_what_a_chain_does_less_its_drafting():
    """If this fails, lookups look as dear as drafts, or cheaper than their rows."""
    costs = made_up(lambda rows: 1 + 0.1 * rows, lambda w, n: 0.05 + 0.02 * (n - 1))
    assert costs.step_seconds(LookedUp(3), 128) == pytest.approx(1.4 + 0.05)
    dear = made_up(lambda rows: 1 + 0.1 * rows, lambda w, n: 0.2 * (n - 1.5))
    assert dear.step_seconds(LookedUp(3), 128) == pytest.approx(1.4)  # never less than nothing
    alone = Costs({128: {1: 1.1, 4: 1.4}}, {128: 1.0}, {})
    assert alone.step_seconds(LookedUp(3), 128) == pytest.approx(1.4) and alone.step_seconds(PLAIN, 0) == 1.0


def test_several_texts():
    """If this fails, what several texts cost together is not what their rows, contexts and drafts cost."""
    costs = made_up(lambda rows: 1 + 0.1 * rows, lambda w, n: 0.2 * w * (n - 1))
    chain = Drafted(DraftShape(1, 3, 2))
    assert costs.batch_seconds(PLAIN, 4, 128) == pytest.approx(1.4)
    assert costs.batch_seconds(PLAIN, 40, 128) == pytest.approx(5.0)  # beyond what was measured
    assert costs.batch_seconds(chain, 4, 128) == pytest.approx(1 + 1.2 + 0.2 * 4 * 2)
    costs.verify[256] = {rows: seconds + 0.5 for rows, seconds in costs.verify[128].items()}
    assert costs.batch_seconds(PLAIN, 4, 256) == pytest.approx(1.4 + 4 * 0.5)


def test_there_and_back():
    costs = made_up(lambda rows: 1.0 + rows)
    assert Costs.from_dict(json.loads(json.dumps(costs.to_dict()))) == costs


@pytest.mark.parametrize(
    "damage",
    [
        {"plain": {"128": -1}},
        {"plain": {"128": float("nan")}},
        {"plain": {"128": float("inf")}},
        {"plain": {"x": 1}},
        {"plain": {}},
        {"verify": {"128": {}}},
        {"verify": {}},
        {"verify": None},
        {"draft": []},
    ],
    ids=str,
)
def test_damaged_costs_are_refused(damage):
    """If this fails, a file that a crash left decides what is drafted."""
    fields = json.loads(json.dumps(made_up(lambda rows: 1.0).to_dict()))
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        Costs.from_dict(fields | damage)


def test_noise_does_not_make_long_contexts_free():
    """If this fails, costs measured on a busy machine fall below zero far out, and what is computed from them fails."""
    costs = Costs({128: {1: 3.0, 4: 4.0}, 448: {1: 2.0, 4: 1.0}}, {128: 3.0, 448: 1.0}, {1: {2: 1.0, 5: 0.5}})
    for length in (0, 128, 448, 10_000):
        assert costs.step_seconds(PLAIN, length) == 3.0
        assert costs.step_seconds(Drafted(DraftShape(1, 9, 8)), length) == 5.0
