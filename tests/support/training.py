"""Trainings that are stopped in the middle, and what they leave."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten


def stop_in_update(monkeypatch, method, update):
    """Stops the trainings of a method, as Ctrl-C does, in this update, counted from 1; returns a list with an entry
    for each update that was begun."""
    real, begun = method.scores, []

    def stopping(self, drafter, batch):
        begun.append(1)
        if len(begun) == update:
            raise KeyboardInterrupt
        return real(self, drafter, batch)

    monkeypatch.setattr(method, "scores", stopping)
    return begun


def differing(left, right):
    """The names of the parameters in which two modules of one shape differ."""
    pairs = zip(tree_flatten(left.parameters()), tree_flatten(right.parameters()), strict=True)
    return [name for (name, a), (_, b) in pairs if not mx.array_equal(a, b)]


def check_resumption(run, method, monkeypatch, folder, plan):
    """Fails unless a run of 15 updates, stopped in the 8th and saved every 5, ends as an undisturbed one.

    Args:
        run: trains as the plan says in a folder, and returns the drafter.
    """
    quiet = run(folder / "quiet", plan)
    begun = stop_in_update(monkeypatch, method, 8)
    with pytest.raises(KeyboardInterrupt):
        run(folder / "stopped", plan)
    stopped = run(folder / "stopped", plan, resume=True)
    assert len(begun) == 8 + 10  # from update 5 on
    assert not differing(quiet, stopped)
