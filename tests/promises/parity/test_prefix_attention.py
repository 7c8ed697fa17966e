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


@pytest.mark.parametrize(("hidden", "heads", "window"), [(128, 2, 5), (48, 1, 30)])
def test_the_layer(hidden, heads, window):
    """If this fails, the layer is another function than its documentation says."""
    torch.manual_seed(1)
    theirs = reference.PrefixAttention(3 * hidden, hidden, 40, window, heads).to(DEVICE)
    ours = PrefixAttention(3 * hidden, hidden, 40, window)
    weights = {name.removesuffix(".weight"): mx.array(to_numpy(value)) for name, value in theirs.state_dict().items()}
    ours.load_weights([(f"{reference.NAMES[name]}.weight", value) for name, value in weights.items()])
    contexts, embeddings = torch.randn(12, 3 * hidden, device=DEVICE), torch.randn(12, hidden, device=DEVICE)
    with torch.no_grad():
        expected = theirs(contexts, embeddings)
    found = ours(mx.array(to_numpy(contexts))[None], mx.array(to_numpy(embeddings))[None])[0]
    assert worst(found, expected) < 1e-4
