"""ReDrafter in plain PyTorch: slow, unbatched, without a KV cache, and easy to check by eye.

The MLX path is compared with this one in `test_torch_parity.py`. It is written from the
equations and shares no code with `mlx_redrafter`, so that a mistake has to be made twice,
in two different shapes, to stay unseen; `pairs` alone knows both sides. Where there is a
CUDA device, it runs there.
"""

import torch

from .beam_search import Hypothesis, beam_search
from .decoding import accept, plain, speculative
from .drafter import Drafter
from .tree import Tree, candidate_tree
from .verification import read, read_sequence, verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

__all__ = [
    "DEVICE",
    "Drafter",
    "Hypothesis",
    "Tree",
    "accept",
    "beam_search",
    "candidate_tree",
    "plain",
    "read",
    "read_sequence",
    "speculative",
    "verify",
]
