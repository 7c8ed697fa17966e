"""Goes on with a learning curve, and says how sure that is.

Knows nothing of drafters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS = 30_000
ROUNDING = 2e-3  # an accuracy on a few thousand positions is not known better
SHARE = (0.1, 0.5, 0.9)


def learned_by(updates: Sequence[int], iters: int, warm_up: int) -> np.ndarray:
    """How much is learned after so many updates, as the sum of the learning rates, the peak being 1.

    The rate rises over the warm-up, and falls by a cosine (see `optimizer_for`): updates at the
    end of a run move the weights little.
    """
    steps = np.arange(iters)
    rising = (steps + 1) / max(1, warm_up)
    falling = 0.5 * (1 + np.cos(np.pi * np.clip((steps - warm_up) / max(1, iters - warm_up), 0, 1)))
    rate = np.cumsum(np.where(steps < warm_up, rising, falling))
    return rate[np.array(updates) - 1]


def forecast(learned: np.ndarray, accuracies: np.ndarray, at: float) -> tuple[float, float, float]:
    """The accuracy when `at` is learned: its lower and upper end (80 of 100) around the middle.

    Curves a - b x^-c, learning's usual power law, are drawn at random, with b fitted to the points, and weighed by how
    well they meet them; how noisy the points are is learned from them too (a t distribution).

    Args:
        learned: (n,) rising, from `learned_by`.
        accuracies: (n,) shares from 0 to 1.
    """
    random = np.random.default_rng(0)
    x = learned / learned[-1]  # the last point is 1: there b is what is still to be won
    best = float(accuracies.max())
    ends = random.uniform(max(0.0, best - 0.05), 1.0, DRAWS)
    powers = np.exp(random.uniform(np.log(0.1), np.log(2.0), DRAWS))
    falls = x[None] ** -powers[:, None]
    gaps = ends[:, None] - accuracies[None]
    still = np.maximum(0, (gaps * falls).sum(1) / (falls**2).sum(1))
    errors = ((gaps - still[:, None] * falls) ** 2).sum(1) + len(x) * ROUNDING**2
    weights = errors ** (-len(x) / 2)
    found = np.clip(ends - still * (at / learned[-1]) ** -powers, 0, 1)
    order = np.argsort(found)
    held = np.cumsum(weights[order]) / weights.sum()
    low, middle, high = (float(found[order][np.searchsorted(held, share)]) for share in SHARE)
    return low, middle, high
