"""What is known of a pair, as figures that agree with one another."""

import pytest
from support.costs import made_up

from mlx_redrafter.decoding.planner import StepRead
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape
from mlx_redrafter.tuning import report
from mlx_redrafter.tuning.acceptance_model import AcceptanceModel
from mlx_redrafter.tuning.session import SHAPES, Session
from mlx_redrafter.tuning.shape_controller import Controller
from mlx_redrafter.tuning.step_costs import Costs

COSTS = made_up(lambda rows: 0.01 + 0.0005 * rows, lambda w, n: 0.0002 * w * (n - 1), plain=0.01)


def known(steps=0, costs=COSTS):
    acceptance = AcceptanceModel()
    for _ in range(steps):
        acceptance.learn(StepRead(Drafted(DraftShape()), [1, 1], 20))
    return Session(None, {"device": "a device"}, "abc", costs, steps == 0, acceptance, list(SHAPES))


def test_facts():
    """If this fails, scripts read figures that do not belong together."""
    session = known()
    facts = report.facts(session)
    assert facts["costs"] == COSTS.to_dict() and facts["measured_now"] and facts["file"] is None
    speeds = [one["expected_tokens_per_second"] for one in facts["candidates"]]
    shapes = [one["shape"] for one in facts["candidates"]]
    assert speeds == sorted(speeds, reverse=True) and len(speeds) == 1 + len(SHAPES) and None in shapes
    assert facts["choice"] == shapes[0]
    for one in facts["candidates"]:
        assert one["expected_tokens_per_second"] == pytest.approx(
            one["expected_acceptance_length"] / one["seconds_per_step"]
        )
        plan = PLAIN if one["shape"] is None else Drafted(DraftShape(**one["shape"]))
        assert one["seconds_per_step"] == COSTS.step_seconds(plan, 128)


def test_text():
    """If this fails, people are told other figures than scripts are."""
    session = known(steps=40)
    lines = report.text(session).splitlines()
    first = session.memory.acceptance.shares()[0]
    assert any(f"by depth: {first[0]:.0%} {first[1]:.0%}" in line and "from 40 drafted" in line for line in lines)
    assert any(
        line.startswith(f"Choice to begin with: {Controller(session.memory).plan()} (behind 128 ") for line in lines
    )
    assert lines[-1] == "Measured before; not kept" and "Measured now" in report.text(known())
    plain = next(line.split() for line in lines if line.split()[:2] == ["plain", "1.00"])
    assert plain == ["plain", "1.00", "10.00", "100.00", "1.00"]
    assert any(line.split()[:2] == ["16", "18.00"] for line in lines)


def test_costs_without_a_drafter():
    """If this fails, a report of lookup alone breaks."""
    lines = report.cost_lines(Costs({128: {1: 0.01, 4: 0.02}, 448: {1: 0.03}}, {128: 0.01, 448: 0.02}, {}))
    rows = [line.split() for line in lines[0].splitlines()] if len(lines) == 1 else [line.split() for line in lines]
    assert ["4", "20.00", "2.00"] in rows and ["1", "10.00", "30.00", "1.00"] in rows
    assert not any("Drafting" in line for line in lines)
