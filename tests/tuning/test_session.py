"""From costs and shares to a shape: the arithmetic behind `auto`."""

import itertools

import mlx.core as mx
import pytest
from mlx_redrafter.decoding.steering import Outcome
from mlx_redrafter.tuning.calibration import Calibration
from mlx_redrafter.tuning.expectation import Expectation
from support import make_drafter, make_model
from support.costs import made_up, shares

from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import CHAIN
from mlx_redrafter.tuning.session import (
    Limits,
    all_shapes,
    best_shape,
    few_shapes,
    key_of,
    tuning_for,
    weights_digest,
)
from mlx_redrafter.tuning.shape_controller import Memory
from mlx_redrafter.tuning.step_costs import LENGTHS, LONG_ROWS, ROWS, WIDTHS, Costs, measure


def test_rows_that_cost_nothing_make_a_large_tree():
    shape, speed = best_shape(made_up(lambda rows: 1.0), *shares(0.7))
    assert shape.num_draft_tokens == 31 and shape.beam_width > 1
    assert speed > 3


def test_rows_that_cost_as_much_as_steps_make_plain_decoding():
    """As on MLX's own BLAS, or quantised on M1 and M2: every row reads all weights again."""
    costs = made_up(lambda rows: float(rows))
    shape, speed = best_shape(costs, *shares(0.7))
    assert shape == DraftShape(1, 2, 1) and speed < 1
    assert Memory(costs, Calibration(), few_shapes(costs, Calibration())).current is None


def test_a_tree_ends_before_the_step_in_its_cost():
    """As on an M2 Ultra, whose step of 16 rows takes 81 ms where one of 15 takes 43."""
    costs = made_up(lambda rows: 0.0)
    costs.verify[128] = {rows: 0.040 + 0.0002 * rows if rows <= 15 else 0.081 for rows in (*range(1, 17), 24, 32)}
    costs.plain[128], costs.draft = 0.04, {w: {2: 0.0005, 5: 0.002} for w in WIDTHS}
    shape, _ = best_shape(costs, *shares(0.7))
    assert 1 + shape.num_draft_tokens <= 15 and shape.num_draft_tokens >= 11


def test_a_drafter_that_is_slow_makes_shorter_drafts():
    free, slow = (made_up(lambda r: 1 + 0.02 * r, lambda w, n, s=s: s * (n - 1)) for s in (0.0, 0.4))
    lengths = [best_shape(costs, *shares(0.7))[0].beam_length for costs in (free, slow)]
    assert lengths[1] < lengths[0]


def test_limits_are_kept():
    costs = made_up(lambda rows: 1.0)
    chain, _ = best_shape(costs, *shares(0.9), Limits(width=1))
    assert chain == DraftShape(1, 9, 8)
    assert best_shape(costs, *shares(0.9), Limits(width=3, length=4))[0] == DraftShape(3, 4, 8)
    for shape in all_shapes(Limits()):
        shape.check(97)
    verifier = verifier_of(make_model())
    verifier.capability = CHAIN
    assert Limits.of(verifier, make_drafter()) == Limits(width=1)


def test_few_shapes_serve_drafters_of_any_quality():
    """If this fails, a drafter that turns out otherwise than assumed is left with a shape far from its best."""
    costs = made_up(lambda rows: 1 + 0.06 * rows, lambda w, n: (0.03 + 0.01 * w) * (n - 1), plain=1.0)
    few = few_shapes(costs, Calibration())
    assert 3 <= len(few) <= 7
    for quality in (0.25, 0.4, 0.6, 0.75, 0.85):
        expectation = Expectation(*shares(quality))
        at_hand = max((1 + expectation.accepted(s)) / costs.step_seconds(s, 128) for s in few)
        assert at_hand > 0.97 * best_shape(costs, *shares(quality))[1]


def test_expected_lengths():
    expectation = Expectation([0.8, 0.5, 0.5], [0.4, 0.3, 0.2])
    assert expectation.accepted(DraftShape(1, 4, 3)) == pytest.approx(0.8 + 0.4 + 0.2)
    # Level by level without a limit of width: the best W of the first level are its W first children.
    assert expectation.accepted(DraftShape(3, 2, 3)) == pytest.approx(0.8 + 0.2 * (0.4 + 0.6 * 0.3), rel=0.03)
    lengths = [expectation.accepted(DraftShape(4, 5, nodes)) for nodes in range(4, 17)]
    gains = [b - a for a, b in zip([expectation.accepted(DraftShape(4, 5, 3)), *lengths], lengths)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(gains)) and gains[-1] >= 0
    # What is sure goes deep, what is not goes wide: better than any chain of as many nodes.
    assert expectation.accepted(DraftShape(4, 5, 4)) > expectation.accepted(DraftShape(1, 5, 4))
    assert Expectation([0.0] * 3, [0.0] * 3).accepted(DraftShape(4, 5, 8)) == 0


def test_calibration_counts_only_what_was_there_to_check():
    """If this fails, the end of a chain counts as a wrong draft, or siblings as first choices."""
    calibration = Calibration()
    for _ in range(400):
        calibration.learn(Outcome(DraftShape(), 3, [1, 1, 1], [0, 0, 0]))
        calibration.learn(Outcome(DraftShape(), 1, [1, 1, 1], [0]))
        # Right: the second child of the root, then nothing below it.
        calibration.learn(Outcome.of_tree(DraftShape(2, 3, 4), path=[0, 2], parents=[0, 0, 0, 1, 1]))
    first, later = calibration.first(), calibration.later()
    assert first[0] == pytest.approx(2 / 3, abs=0.02)  # right, right, wrong
    assert first[1] == pytest.approx(1 / 2, abs=0.02)  # right, wrong, not there
    assert first[2] == pytest.approx(1, abs=0.05) and first[3] == pytest.approx(1, abs=0.05)
    assert later[0] == pytest.approx(1, abs=0.05)
    assert calibration.steps == 1200 and sum(calibration.tried) < 1000
    assert Calibration.from_dict(calibration.to_dict()) == calibration


def test_a_tree_outcome_is_read_from_its_rows():
    #        0
    #      1   2       rows in order of probability: 3 and 5 hang on 1, 4 on 2
    parents = [0, 0, 0, 1, 2, 1]
    found = Outcome.of_tree(None, [0, 1, 5], parents)
    assert (found.accepted, found.children, found.ranks) == (2, [2, 2, 0], [0, 1])
    assert Outcome.of_tree(None, [0], parents).children == [2]


def test_costs_between_the_points():
    costs = Costs({100: {1: 1.0, 3: 2.0}, 1100: {1: 2.0, 3: 3.0}}, {100: 0.9, 1100: 1.9}, {1: {2: 0.1, 5: 0.4}})
    assert costs.verify_seconds(2, 100) == 1.5 and costs.verify_seconds(9, 0) == 2.0
    assert costs.verify_seconds(1, 600) == pytest.approx(1.5) and costs.verify_seconds(1, 2100) == pytest.approx(3)
    assert costs.step_seconds(None, 600) == pytest.approx(1.4)
    assert costs.draft_seconds(1, 4) == pytest.approx(0.3) and costs.draft_seconds(6, 7) == pytest.approx(0.6)
    assert costs.step_seconds(DraftShape(1, 3, 2), 100) == pytest.approx(2.0 + 0.2)


def test_measured_through_the_real_parts(small_model):
    """Every table is filled, with the time that passed, and nothing of the models is changed."""
    before = mx.array(small_model.lm_head.weight)
    costs = measure(verifier_of(small_model), make_drafter(), seconds=0)
    assert list(costs.verify) == [128, 448] and list(costs.plain) == [128, 448]  # of a context of 512
    assert list(costs.verify[128]) == list(ROWS) and list(costs.verify[448]) == list(LONG_ROWS)
    assert {w: list(t) for w, t in costs.draft.items()} == {w: list(LENGTHS) for w in WIDTHS}
    assert all(0 < s < 5 for table in costs.verify.values() for s in table.values())
    assert mx.array_equal(before, small_model.lm_head.weight)
    ticks = iter(range(10**6))
    by_clock = measure(verifier_of(small_model), make_drafter(), seconds=0, clock=lambda: float(next(ticks)))
    assert by_clock.verify[128][1] == by_clock.plain[128] == 0.5 and by_clock.draft[4][5] == 0


def test_pairs_are_told_apart():
    def key(model, drafter):
        return key_of(verifier_of(model), drafter)

    usual = key(make_model(), make_drafter())
    assert usual == key(make_model(seed=5), make_drafter(seed=5))  # weights do not matter to the time
    half = make_model()
    half.set_dtype(mx.float16)
    assert len({str(k) for k in (usual, key(half, make_drafter()), key(make_model(), make_drafter(exit_dim=16)))}) == 3
    assert weights_digest(make_drafter()) == weights_digest(make_drafter()) != weights_digest(make_drafter(seed=1))
    wide = make_model()
    for layer in wide.layers:
        layer.self_attn.n_heads //= 2
    assert key(wide, make_drafter()) != usual


def test_a_pair_is_measured_once(small_model, monkeypatch):
    """If this fails, every text begins with two seconds of measuring."""
    verifier, drafter = verifier_of(small_model), make_drafter()
    first = tuning_for(verifier, drafter)
    monkeypatch.setattr("mlx_redrafter.tuning.session.measure", lambda *_: pytest.fail("measured again"))
    assert tuning_for(verifier, drafter) is first
    assert tuning_for(verifier, make_drafter(seed=3)).kept.costs == first.kept.costs
