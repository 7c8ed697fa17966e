"""Converted GGUF files compute what the transformers models that they were made of compute."""

from __future__ import annotations

from support import gguf_files
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from mlx_redrafter.convert.gguf import write_model
from mlx_redrafter.convert.gguf.rope import _frequencies

TOKENS = [5, 17, 200, 3, 99, 42, 250, 7, 7, 130, 64, 11, 2, 180]


def logits(folder) -> np.ndarray:
    model, _ = mlx_lm.load(str(folder))
    return np.array(model(mx.array([TOKENS]))[0].astype(mx.float32))


@pytest.mark.parametrize("name", gguf_files.MODELS)
def test_logits(name, tmp_path):
    model = gguf_files.random_model(name)
    file = gguf_files.write_gguf(name, model, tmp_path / "model.gguf")
    folder = tmp_path / "out"
    folder.mkdir()
    summary = write_model(file, folder)
    assert not summary.changed and summary.dtype == "float32"
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    assert expected.std() > 0.05
    np.testing.assert_allclose(logits(folder), expected, atol=1e-3)


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
