"""KV caches of which each process has a part: all keep the same ones, whatever each has room for."""

from __future__ import annotations

import queue
from unittest.mock import create_autospec

import mlx.core as mx
import pytest
from support import filled, make_model

from mlx_redrafter.server.caches import shared
from mlx_redrafter.server.caches.shared import SharedPromptCaches
from mlx_redrafter.system.ranks import Ranks

KEPT = 3


@pytest.fixture
def two(monkeypatch):
    """The caches of two processes, the second one's twice as large; the first one has room for some."""
    models, said = [make_model(), make_model(hidden=64)], queue.SimpleQueue()
    caches = [filled(model, [0]) for model in models]
    least = int((KEPT + 0.5) * sum(layer.nbytes for layer in caches[0]))
    ranks = [create_autospec(Ranks, instance=True) for _ in models]
    found = []
    for rank, one in enumerate(ranks):
        one.first, one.group = rank == 0, mx.distributed.init()
        one.share.side_effect = (lambda value: said.put(value) or value) if one.first else lambda _: said.get_nowait()
        found.append(SharedPromptCaches(one, 10, least))
        found[-1].max_bytes += rank << 40  # this machine has more
    monkeypatch.setattr(mx.distributed, "all_min", lambda array, **_: mx.array(least >> 10, mx.int32))
    monkeypatch.setattr(shared, "apart", lambda target, kinds: "")
    for one, model in zip(found, models, strict=True):
        one.open("m", model)
    return found, models


def test_all_keep_the_same(two):
    """If this fails, one process goes on from a cache that another one has dropped, and all wait for ever."""
    found, models = two
    for i in range(5):
        for one, model in zip(found, models, strict=True):
            one.insert_cache("m", [i, 7], filled(model, [i]))
    assert [len(one) for one in found] == [KEPT, KEPT]
    for one in found:
        one.trim_to(n_bytes=found[0].nbytes - 1)  # what texts that are being written leave
    for i in range(5):
        assert [one.fetch_nearest_cache("m", [i, 7, 8])[0] is not None for one in found] == [i >= 3] * 2
    assert found[1].nbytes > found[0].nbytes


def test_parts_of_different_kinds_are_not_kept(two, monkeypatch):
    """If this fails, a part with windows cannot be cut where one without can, and the parts go different ways."""
    found, models = two
    monkeypatch.setattr(shared, "apart", lambda target, kinds: "the processes have layers of other kinds each")
    for one, model in zip(found, models, strict=True):
        one.max_bytes = 1 << 20
        one.open("m", model)
        one.insert_cache("m", [5, 7], filled(model, [5, 7]))
    assert [len(one) for one in found] == [0, 0]
