"""Texts and caches of any length."""

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache
from mlx_redrafter.benchmarks.architectures.small_models import build
from mlx_redrafter.benchmarks.long_context import cache_bytes, long_text, roomy_cache

from mlx_redrafter.target.cache.kv_cache import leaves


def test_long_contexts(pair):
    model, _, tokenizer = pair
    text = long_text(tokenizer, 3000)
    assert len(text) == 3000 and len(set(text)) > 100
    caches = roomy_cache(model, 700)
    assert all(cache.offset == 0 and cache.keys.shape[2] == 700 for cache in caches)
    model(mx.array([text[:600]]), cache=caches)
    assert all(cache.offset == 600 and cache.keys.shape[2] == 700 for cache in caches)
    assert cache_bytes(model, 1) == 7 * 2 * 2 * 64 * 4
    assert cache_bytes(model, 50) == 50 * cache_bytes(model, 1)


# Of small instances: bytes per token of the layers that grow, tokens of their windows, bytes of states.
@pytest.mark.parametrize(
    ("module", "per_token", "window", "states"),
    [
        ("qwen3_next", 2 * 2 * 2 * 16 * 4, None, 2 * (3 * 128 + 4 * 16 * 16) * 4),  # gated delta nets beside attention
        ("gpt_oss", 2 * 2 * 2 * 64 * 4, 128, 0),  # every other layer a window
    ],
)
def test_caches_that_are_not_all_keys_and_values(module, per_token, window, states):
    """If this fails, the memory that a recurrent or windowed target needs is a traceback, or wrong."""
    model = build(module)
    in_windows = per_token if window else 0
    for tokens in (3, 200):
        expected = per_token * tokens + in_windows * min(tokens, window or 0) + states
        assert cache_bytes(model, tokens) == expected
    roomy = leaves(roomy_cache(model, 700))
    assert {cache.keys.shape[2] for cache in roomy if isinstance(cache, KVCache)} == {700}
    assert sum(isinstance(cache, KVCache) for cache in roomy) == 2
    mx.eval(model(mx.array([[1, 2, 3]]), cache=roomy))
