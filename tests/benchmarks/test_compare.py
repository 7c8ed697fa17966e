"""Turns are fair, and the figures are those of the definitions."""

import types
from unittest.mock import create_autospec

import mlx.core as mx
import pytest
from mlx_lm.generate import generation_stream
from mlx_redrafter.benchmarks import compare
from mlx_redrafter.benchmarks.compare import Run, Spread, measure, side_by_side, summarize, table, turn_order

from mlx_redrafter.errors import UserError


def test_every_method_takes_every_place():
    """If this fails, a method always runs behind the same other one."""
    rounds = [turn_order(["a", "b", "c"], turn) for turn in range(3)]
    assert rounds == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_the_reference_comes_back():
    names = ["plain", *"abcde"]
    assert turn_order(names, 0, 2) == ["plain", "a", "b", "plain", "c", "d", "plain", "e"]
    assert turn_order(names, 1, 2) == ["plain", "b", "c", "plain", "d", "e", "plain", "a"]
    assert turn_order(["plain"], 3, 2) == ["plain"]


def test_side_by_side_runs_each_on_each():
    calls = []

    def method(name):
        def run(prompt):
            calls.append((name, prompt))
            return (types.SimpleNamespace(token=t, text="", steps=1) for t in prompt)

        return run

    after = []
    runs = side_by_side({"a": method("a"), "b": method("b")}, [(1, 2), (3, 4, 5)], repeats=2, after=after.append)
    assert calls[:2] == [("a", (1, 2)), ("b", (1, 2))]  # warms up
    assert calls[2:6] == [("a", (1, 2)), ("b", (1, 2)), ("b", (1, 2)), ("a", (1, 2))]
    assert [[run.tokens for run in text] for text in runs["b"]] == [[[1, 2]] * 2, [[3, 4, 5]] * 2]
    assert after == [(1, 2), (1, 2), (3, 4, 5), (3, 4, 5)]


def test_nothing_is_left_on_its_way():
    """If this fails, a method is timed beside a step that the one before it began."""
    waited = create_autospec(mx.synchronize)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.mx, "synchronize", waited)
        measure(iter([types.SimpleNamespace(token=1, text="", steps=1)]))
    found = [call.args[0] for call in waited.call_args_list]
    assert found == [mx.default_stream(mx.default_device()), generation_stream]


def test_figures():
    """If this fails, the tables say something else than their notes."""
    nine = list(range(9))
    runs = {
        "plain": [[Run(nine, 8.0, 8)], [Run(nine, 16.0, 8)], [Run([1], 0.0, 0)]],
        "drafted": [
            [Run(nine, 4.0, 4), Run(nine, 2.0, 4), Run(nine, 9.0, 4)],
            [Run(nine[::-1], 4.0, 2)],
            [Run([1], 0, 0)],
        ],
    }
    plain, drafted = summarize(runs).values()
    assert plain.speed_ups == [1, 1, None] and plain.efficiency == 1 and (plain.equal, plain.runs) == (3, 3)
    assert drafted.speed_ups == [2, 4, None]  # the median run counts
    assert drafted.speed_up == Spread(3, 2.5, 3.5)
    assert drafted.acceptance == 32 / 14 and drafted.tokens_per_second == 32 / 19
    assert drafted.efficiency == 1.0  # 2 / 2 and 4 / 4
    assert (drafted.equal, drafted.runs) == (4, 5)
    assert table(runs).text().endswith("Texts equal to the plain one, token for token: 4 of 5")


def test_nothing_to_time():
    with pytest.raises(UserError, match="ended after its first token"):
        summarize({"plain": [[Run([1], 0.0, 0)]]})


def test_steps_are_those_of_the_stream():
    ours = [types.SimpleNamespace(token=t, text="", steps=s) for t, s in ((5, 0), (6, 1), (7, 1))]
    theirs = [types.SimpleNamespace(token=t, text="") for t in (5, 6, 7)]
    assert measure(ours).steps == 1 and measure(ours).acceptance == 2
    assert measure(theirs).steps == 2 and measure(theirs).acceptance == 1


def test_rounds_are_told_by_what_was_drafted():
    """mlx_lm drafts along with the prompt; that round is in neither the steps nor the time."""
    flags = [True, False, True, True, False, False, True]
    run = measure(types.SimpleNamespace(token=i, text="", from_draft=flag) for i, flag in enumerate(flags))
    assert (run.before, run.counted, run.accepted, run.steps) == (2, 5, [2, 0, 1], 3)
