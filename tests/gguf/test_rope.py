"""Factors of rotary frequencies, back into the formula that they come from."""

from __future__ import annotations

import pytest
from support import gguf_files

from mlx_redrafter.gguf.rope import _frequencies


@pytest.mark.parametrize(
    "dims, theta, factor, original", [(128, 500000.0, 8.0, 8192), (64, 500000.0, 32.0, 8192), (64, 1e6, 16.0, 4096)]
)
def test_llama3_scaling_is_recovered(dims, theta, factor, original):
    rope = {
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    factors = [float(value) for value in gguf_files.llama3_factors(dims, rope)]
    found = _frequencies(factors, {"rope_theta": theta, "max_position_embeddings": 131072}, dims)
    del rope["rope_theta"]
    assert found == {"rope_type": "llama3", "type": "llama3"} | rope


def test_other_frequency_factors_stay_as_they_are():
    factors = [1.0, 1.2, 2.5, 3.7]
    found = _frequencies(factors, {"rope_theta": 1e4, "max_position_embeddings": 512}, 8)
    assert found["rope_type"] == "longrope" and found["long_factor"] == found["short_factor"] == factors
