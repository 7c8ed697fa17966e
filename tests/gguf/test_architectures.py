"""Converted GGUF files compute what the transformers models that they were made of compute."""

from __future__ import annotations

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from support import gguf_files

from mlx_redrafter.gguf import write_model

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
    tolerance = 5e-3 if name == "gemma" else 1e-3  # mlx-lm's Gemma has the exact GELU, not the one with tanh
    np.testing.assert_allclose(logits(folder), expected, atol=tolerance)
