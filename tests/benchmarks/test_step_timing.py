"""The parts that are timed are those of the real step."""

import types

import pytest
from mlx_redrafter.benchmarks import step_timing

from mlx_redrafter import DraftShape, stream_generate
from mlx_redrafter.drafting.shape import Drafted
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import Verifier


@pytest.mark.parametrize("walk", [step_timing.stages, step_timing.device_times])
def test_taken_apart_a_step_writes_the_same_text(pair, prefixes, walk):
    """If this fails, the parts that are timed are not those of the real step."""
    model, drafter, tokenizer = pair
    shape = DraftShape(4, 5, 7)
    step, committed = step_timing.begin(verifier_of(model), drafter, prefixes[0])
    first = step.root.item()
    walk(step, committed, Drafted(shape), 12)
    made = step.cache.length.item() - committed
    texts = stream_generate(model, tokenizer, prefixes[0], drafter, shape=shape, max_tokens=made + 1)
    tokens = [response.token for response in texts]
    assert made >= 12 and (tokens[0], tokens[-1]) == (first, step.root.item())
    assert len(step_timing.stages(step, committed + made, Drafted(shape), 2)) == 2


def test_rows_are_those_asked_for_and_nothing_is_committed(pair, prefixes, monkeypatch):
    """Behind one context and without a commit: the rows are the only thing that changes."""
    seen = []

    def verified(self, tree, *args):
        seen.append(tree.tokens.shape[1])
        return verify(self, tree, *args)

    rows = step_timing.Rows(verifier_of(pair[0]), prefixes[0])
    verify = Verifier.__call__
    monkeypatch.setattr(Verifier, "__call__", verified)
    clock = iter([10.0, 16.0, 20.0, 21.0])
    monkeypatch.setattr(step_timing.time, "perf_counter", lambda: next(clock))
    # A call's time is its share of what was submitted together.
    assert [rows.seconds(1, calls=2), rows.seconds(32, calls=4)] == [3.0, 0.25]
    assert seen == [1, 1, 32, 32, 32, 32]
    assert rows.cache.length.item() == len(prefixes[0])


def test_a_step_ends_where_the_next_begins(monkeypatch):
    clock = iter([10.0, 13.0, 14.0])
    monkeypatch.setattr(step_timing.time, "perf_counter", lambda: next(clock))
    responses = [types.SimpleNamespace(steps=steps) for steps in (0, 1, 1, 1, 2, 3, 3)]
    assert step_timing.step_times(responses) == [3.0, 1.0]
