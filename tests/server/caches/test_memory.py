"""KV caches in memory: within bounds, and never so whole that nothing is left to read."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_redrafter.benchmarks.architectures import small_models
from support import filled, make_model

from mlx_redrafter.drafting import proposers
from mlx_redrafter.server.caches import memory
from mlx_redrafter.server.caches.files import CacheFiles
from mlx_redrafter.server.caches.memory import PromptCaches


def test_what_drafters_left_goes(small_model):
    """If this fails, every cached prompt holds a drafter's state that no limit counts and nobody finds."""
    cache, caches = filled(small_model, [5, 6]), PromptCaches(10, None)
    proposers.LEFT[cache[0]] = ()
    caches.insert_cache("m", [5, 6], cache)
    assert cache[0] not in proposers.LEFT


@pytest.mark.parametrize("make", [make_model, lambda: small_models.build("mamba2")], ids=["attention", "states"])
def test_something_is_left_to_read(make):
    """If this fails, a prompt that was answered before raises, or is continued from rows that it does not have."""
    model, tokens, caches = make(), [5, 6, 7, 8, 9], PromptCaches(10, None)
    for length in (2, 4, 5):
        caches.insert_cache("m", tokens[:length], filled(model, tokens[:length]))
    for length in range(1, 6):
        cache, rest = caches.fetch_nearest_cache("m", tokens[:length])
        assert rest and rest == tokens[length - len(rest) : length]
        cache = make_prompt_cache(model) if cache is None else cache
        expected = make_prompt_cache(model)
        expected = model(mx.array([tokens[:length]]), cache=expected)[:, -1]
        assert mx.allclose(model(mx.array([rest]), cache=cache)[:, -1], expected, atol=1e-4)


def test_the_limit_is_by_the_memory_that_is_there(small_model, monkeypatch):
    """If this fails, a server's cache grows until the machine has no memory left."""
    cache = filled(small_model, [1, 2, 3])
    size = sum(c.nbytes for c in cache)
    monkeypatch.setattr(memory, "memory_bytes", lambda: mx.get_active_memory() + 2.5 * size / memory.SHARE)
    caches = PromptCaches(100, None)
    caches.open("m", small_model)
    for i in range(5):
        caches.insert_cache("m", [i], cache)
    assert len(caches) == 2 and caches.nbytes <= caches.max_bytes


def test_a_given_limit_stays(small_model):
    caches = PromptCaches(100, 5)
    caches.open("m", small_model)
    caches.insert_cache("m", [1], [KVCache()])
    caches.insert_cache("m", [2], filled(small_model, [2]))
    assert caches.max_bytes == 5 and len(caches) == 0


def test_caches_of_another_form_are_kept_apart(small_model, tmp_path):
    """If this fails, a server whose KV cache is not quantised goes on from one that was."""
    for form in ("", "-8"):
        caches = PromptCaches(10, None, CacheFiles(tmp_path, 10**9), form)
        caches.open("m", small_model)
        assert len(caches) == 0
        caches.insert_cache("m", [1, 2], filled(small_model, [1, 2]))
        caches.close()
    assert len(list(tmp_path.glob("*/*"))) == 2
