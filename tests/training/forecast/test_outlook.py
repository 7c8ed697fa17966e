"""`train --expected`: what is said, that it is said once, and that only `stop` stops."""

import json

import pytest
from support.commands import code_of
from support.costs import made_up

from mlx_redrafter.training.forecast.outlook import outlook
from mlx_redrafter.training.trainer import TrainingPlan

SMALL = ["--rows", "50", "--held-out", "2", "--row-length", "40", "--prefix-length", "8", "--eval-every", "0"]
UPDATES = [40, 50, 64, 80, 100, 125, 160, 200]


def rising(last, factor=1.0):
    return [[factor * share * (1 - 0.4 * (at / 40) ** -0.7) for share in last] for at in UPDATES]


def test_verdicts():
    """If this fails, one who could go home stays, or a drafter is given up that would have been fast."""
    plan = TrainingPlan(iters=2000)
    cheap, dear = made_up(lambda rows: 0.1), made_up(lambda rows: 0.1 * rows)
    said, pays = outlook(UPDATES, rising([0.8, 0.7, 0.6, 0.6]), plan, cheap, 4)
    assert pays and "Going on pays." in said and "Expected after 2,000 updates, from the first 200:" in said
    said, pays = outlook(UPDATES, rising([0.5, 0.4, 0.3, 0.3]), plan, dear, 4)
    assert not pays and "decoding plainly" in said
    flat = [[0.7, 0.6, 0.5, 0.4]] * len(UPDATES)
    said, pays = outlook(UPDATES, flat, plan, cheap, 4)
    assert "x plain decoding on this device" in said


def test_a_real_run(stories, tmp_path, capsys):
    """If this fails, --expected says nothing, or ends a run that should go on."""
    out = tmp_path / "a"
    assert code_of("train", "--model", str(stories), "--out", str(out), *SMALL, "--iters", "40", "--expected") == 0
    printed = capsys.readouterr().out
    assert printed.count("Expected after 40 updates, from the first 4:") == 1 and "tokens per step" in printed
    found = json.loads((out / "training" / "expected.json").read_text())["hits"]
    assert list(found) == ["1", "2", "3", "4"] and all(len(hits) == 4 for hits in found.values())
    assert json.loads((out / "training" / "result.json").read_text())["updates"] == 40


@pytest.mark.slow
def test_watching_changes_nothing(stories, tmp_path):
    """If this fails, --expected changes what is learned."""
    out = tmp_path / "a"
    assert code_of("train", "--model", str(stories), "--out", str(out), *SMALL, "--iters", "40", "--expected") == 0
    text = ["--text", str(out / "training" / "text")]
    assert code_of("train", "--model", str(stories), "--out", str(tmp_path / "b"), *SMALL, "--iters", "40", *text) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("pays", [True, False])
def test_stop_stops_where_it_does_not_pay(pays, stories, tmp_path, capsys, monkeypatch):
    """If this fails, a run ends, or goes on, against its user's word."""
    monkeypatch.setattr("mlx_redrafter.training.forecast.outlook.outlook", lambda *args: ("Said.", pays))
    out = tmp_path / "a"
    flags = [*SMALL, "--iters", "50", "--expected", "stop"]
    assert code_of("train", "--model", str(stories), "--out", str(out), *flags) == 0
    assert json.loads((out / "training" / "result.json").read_text())["updates"] == (50 if pays else 5)
    assert ("Said. Stopped here." in capsys.readouterr().out) != pays
