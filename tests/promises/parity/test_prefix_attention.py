"""Prefix attention on MLX against the PyTorch reference: same weights, same numbers."""

from __future__ import annotations

import mlx_redrafter  # isort: skip # noqa: F401 (before torch and mlx: it puts OpenBLAS in front of MLX's own BLAS)

import mlx.core as mx
import pytest

from mlx_redrafter.drafting.prefix_attention import PrefixAttention

torch = pytest.importorskip("torch", reason="the PyTorch reference needs torch")

from torch_reference import DEVICE  # noqa: E402
from torch_reference import prefix_attention as reference  # noqa: E402
from torch_reference.pairs import to_numpy, worst  # noqa: E402


@pytest.mark.parametrize(("hidden", "heads", "window", "layers"), [(128, 2, 5, 1), (48, 1, 30, 1), (128, 2, 5, 2)])
def test_the_layers(hidden, heads, window, layers):
    """If this fails, the layers are another function than their documentation says."""
    torch.manual_seed(1)
    theirs = reference.PrefixAttention(3 * hidden, hidden, 40, window, heads, layers).to(DEVICE)
    ours = PrefixAttention(3 * hidden, hidden, 40, window, layers)
    weights = theirs.state_dict().items()
    ours.load_weights([(reference.our_name(name), mx.array(to_numpy(value))) for name, value in weights])
    contexts, embeddings = torch.randn(12, 3 * hidden, device=DEVICE), torch.randn(12, hidden, device=DEVICE)
    with torch.no_grad():
        expected = theirs(contexts, embeddings)
    found = ours(mx.array(to_numpy(contexts))[None], mx.array(to_numpy(embeddings))[None])[0]
    assert worst(found, expected) < 1e-4
