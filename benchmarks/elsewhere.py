"""Figures that others published, with their hardware and source. None of them was measured here."""

from __future__ import annotations

import dataclasses

PAPER = "https://arxiv.org/abs/2403.09919"
APPLE = "https://github.com/apple/ml-recurrent-drafter/blob/main/recurrent_drafting/mlx/experiments/README.md"


@dataclasses.dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        source, url: where it stands.
        hardware, target, texts: what it holds for.
        method: who.
        speed_up: over the authors' own plain decoding.
        acceptance: tokens per step, where it is given.
    """

    source: str
    url: str
    hardware: str
    target: str
    texts: str
    method: str
    speed_up: float
    acceptance: float | None


def _paper(number: int, hardware: str, target: str, texts: str, method: str, x: float, a: float) -> Published:
    return Published(f"ReDrafter paper, table {number}", PAPER, hardware, target, texts, method, x, a)


_H100 = ("Nvidia H100, PyTorch", "Vicuna 7B")
_M1, _M2 = "M1 Max, MLX, batch 1", "M2 Ultra, MLX, batch 1"

PUBLISHED = (
    _paper(1, *_H100, "MT-bench, greedy", "Medusa", 2.39, 2.55),
    _paper(1, *_H100, "MT-bench, greedy", "EAGLE", 2.69, 3.96),
    _paper(1, *_H100, "MT-bench, greedy", "ReDrafter", 2.80, 4.20),
    _paper(1, *_H100, "AlpacaEval, greedy", "Medusa", 2.19, 2.42),
    _paper(1, *_H100, "AlpacaEval, greedy", "EAGLE", 2.43, 3.61),
    _paper(1, *_H100, "AlpacaEval, greedy", "ReDrafter", 2.69, 4.06),
    _paper(2, _M1, "Vicuna 7B", "beam length 4", "ReDrafter, 1 beam", 1.32, 2.15),
    _paper(2, _M2, "Vicuna 7B", "beam length 4", "ReDrafter, 3 beams", 1.52, 2.44),
    _paper(2, _M2, "Vicuna 13B", "beam length 4", "ReDrafter, 3 beams", 1.94, 2.82),
    Published("Apple's MLX report", APPLE, "M1 Max, MLX, float16", "Vicuna 7B", "best beam", "ReDrafter", 1.37, None),
    Published("Apple's MLX report", APPLE, "M2 Ultra, MLX, float16", "Vicuna 7B", "best beam", "ReDrafter", 1.52, None),
)  # fmt: skip
