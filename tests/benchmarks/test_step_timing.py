"""The parts that are timed are those of the real step."""

import types

import pytest
from mlx_redrafter.benchmarks import step_timing

from mlx_redrafter import DraftShape, stream_generate
from mlx_redrafter.drafting.shape import Drafted
from mlx_redrafter.target.probe import verifier_of


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


def test_rows_cost_more_than_none(pair, prefixes):
    """Behind one context and without a commit: the rows are the only thing that changes."""
    rows = step_timing.Rows(verifier_of(pair[0]), prefixes[0])
    times = {count: min(rows.seconds(count, calls=2) for _ in range(4)) for count in (1, 32)}
    assert 0 < times[1] < times[32]
    assert rows.cache.length.item() == len(prefixes[0])


def test_a_step_ends_where_the_next_begins(monkeypatch):
    clock = iter([10.0, 13.0, 14.0])
    monkeypatch.setattr(step_timing.time, "perf_counter", lambda: next(clock))
    responses = [types.SimpleNamespace(steps=steps) for steps in (0, 1, 1, 1, 2, 3, 3)]
    assert step_timing.step_times(responses) == [3.0, 1.0]
