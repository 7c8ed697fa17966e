"""The interval of a forecast holds what really comes, about as often as it says."""

import numpy as np
import pytest

from mlx_redrafter.training.forecast.curve import forecast, learned_by


@pytest.mark.parametrize("noise", [0.002, 0.01])
def test_the_interval_holds_the_end(noise):
    """If this fails, an evening is judged by a figure that is surer of itself than it may be."""
    random, inside, widths, misses = np.random.default_rng(1), 0, [], []
    updates = sorted({round(2000 * share) for share in np.geomspace(0.02, 0.1, 8)})
    learned = learned_by([*updates, 2000], 2000, 50)
    for _ in range(80):
        end, power = random.uniform(0.35, 0.9), random.uniform(0.2, 1.2)
        won = random.uniform(0.1, 0.35)  # between the last point and the end of all learning
        curve = end - won * (learned / learned[-2]) ** -power
        low, middle, high = forecast(learned[:-1], curve[:-1] + noise * random.normal(size=len(updates)), learned[-1])
        assert low <= middle <= high
        inside += low <= curve[-1] <= high
        widths.append(high - low)
        misses.append(abs(middle - curve[-1]))
    assert 0.7 <= inside / 80 <= 0.97
    assert np.mean(widths) < 0.35 and np.mean(misses) < 0.1


def test_what_has_been_learned():
    """If this fails, updates with a small learning rate count like others."""
    done = learned_by(range(1, 101), 100, 10)
    each = np.diff(done, prepend=0)
    assert (np.diff(each[:10]) > 0).all() and (np.diff(each[11:]) < 0).all() and each[-1] < 0.01
    assert learned_by([1, 2, 10], 10, 0)[-1] == pytest.approx(5.5, abs=0.1)
