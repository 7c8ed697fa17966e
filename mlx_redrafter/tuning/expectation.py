"""How many draft tokens a shape should get accepted, from a drafter's calibrated shares.

The expected number is the sum, over the nodes of a tree, of the probability that the
target's text runs through them. A chain of n therefore gets q1 + q1 q2 + ... + q1...qn. A
best-first tree holds the most probable nodes of each step, and which those are differs from
step to step: where the drafter is sure, deep ones, where it is not, siblings. So steps are
drawn with a spread of sureness around the mean shares, the tree is grown for each of them
as beam search grows it, and the sums are averaged. The draws are the same every time.
"""

from __future__ import annotations

import numpy as np

from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.tuning.calibration import DEPTHS, RANKS

DRAWS = 192
# A drafter's probability of its best token is drawn from two values around the mean q:
# q + SPREAD (1 - q) with probability q, else q - SPREAD q. The mean stays q; SPREAD = 1 would
# be a drafter that always knows whether it is right. A Beta(q, 1 - q) has the variance of 0.7.
SPREAD = 0.7


class Expectation:
    """Expected accepted draft tokens of all shapes.

    Args:
        first: shares of right best children, by depth.
        later: shares of right children of rank 1, 2, ... where those before were wrong.
    """

    def __init__(self, first: list[float], later: list[float]):
        self.first_shares, self.later_shares = np.array(first), np.array(later)
        self._levels: dict[int, list[np.ndarray]] = {}
        self._sums: dict[tuple[int, int], np.ndarray] = {}
        self._accepted: dict[DraftShape, float] = {}

    def accepted(self, shape: DraftShape) -> float:
        """Expected accepted draft tokens of one step of a shape."""
        if (known := self._accepted.get(shape)) is None:
            known = self._accepted[shape] = self._expect(shape)
        return known

    def _expect(self, shape: DraftShape) -> float:
        depth, nodes = shape.beam_length - 1, shape.num_draft_tokens
        if shape.beam_width == 1:
            shares = [self._first(level) for level in range(min(depth, nodes))]
            return float(np.sum(np.cumprod(shares)))
        key = (shape.beam_width, depth)
        if key not in self._sums:
            if len(self._levels.get(shape.beam_width, ())) < depth:
                self._levels[shape.beam_width] = self._grow(shape.beam_width, max(depth, DEPTHS))
            probabilities = np.concatenate(self._levels[shape.beam_width][:depth], axis=1)
            probabilities.sort(axis=1)
            self._sums[key] = np.cumsum(probabilities[:, ::-1].mean(axis=0))
        sums = self._sums[key]
        return float(sums[min(nodes, len(sums)) - 1])

    def _first(self, level: int) -> float:
        return float(self.first_shares[min(level, len(self.first_shares) - 1)])

    def _grow(self, width: int, depth: int) -> list[np.ndarray]:
        """Probabilities of the paths to a beam's entries, level by level, (DRAWS, width) each."""
        rng = np.random.default_rng(0)
        above, levels = np.ones((DRAWS, 1)), []
        wrong = np.concatenate([[1.0], np.cumprod(1 - self.later_shares)])[:-1]
        spread_over = (wrong * self.later_shares)[: max(0, min(width, RANKS) - 1)]
        for level in range(depth):
            q = self._first(level)
            sure = rng.random((DRAWS, width))[:, : above.shape[1]] < q
            best = np.where(sure, q + SPREAD * (1 - q), q - SPREAD * q)
            children = np.concatenate([best[..., None], (1 - best)[..., None] * spread_over], axis=2)
            paths = (above[..., None] * children).reshape(DRAWS, -1)
            if paths.shape[1] > width:
                paths = -np.partition(-paths, width - 1, axis=1)[:, :width]
            above = paths
            levels.append(paths)
        return levels
