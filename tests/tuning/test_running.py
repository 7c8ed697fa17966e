"""Averages start from what is assumed and end at what is seen."""

import pytest

from mlx_redrafter.tuning.running import SHARED, RecentMedian, RunningShare, Slowness


def test_a_share_goes_from_assumed_to_seen():
    """If this fails, one wrong draft counts as much as all that is assumed, or seeing never wins."""
    share = RunningShare(weight=4.0, memory=50.0)
    assert share.share(0.7) == 0.7
    share.learn(1)
    assert share.share(0.5) == pytest.approx((1 + 4 * 0.5) / 5)
    for _ in range(1000):
        share.learn(0)
    assert share.tries == pytest.approx(50.0)  # what memory leaves of any number
    assert share.share(1.0) == pytest.approx(4 / 54, abs=1e-6)


def test_old_tries_count_less():
    """If this fails, a text that has changed is judged by how it began."""
    share = RunningShare(weight=1.0, memory=20.0)
    for hits in [1] * 200 + [0] * 20:
        share.learn(hits)
    assert share.share(0.5) == pytest.approx((20 * (1 - 1 / 20) ** 20 + 0.5) / 21, rel=1e-3)
    share.fade(0.0)
    assert share.share(0.25) == 0.25


def test_shares_of_several_tries():
    """If this fails, accepted over expected draft tokens is no share of the expected ones."""
    share = RunningShare(weight=0.0, memory=1e9)
    share.learn(3, 2.0)
    share.learn(1, 2.0)
    assert share.share(1.0) == pytest.approx(1.0)


def test_a_median_of_the_last_few():
    """If this fails, one slow step makes a shape slow, or an old time counts for ever."""
    median = RecentMedian(5)
    assert median.value(1.5, trusted=4) == 1.5
    median.learn(3.0)
    assert median.value(1.0, trusted=4) == pytest.approx(0.25 * 3.0 + 0.75 * 1.0)  # drawn towards the assumption
    for value in (3.0, 3.0, 500.0):
        median.learn(value)
    assert median.value(1.0, trusted=4) == 3.0
    for _ in range(5):
        median.learn(7.0)
    assert median.value(1.0, trusted=4) == 7.0 and list(median.values) == [7.0] * 5


def test_slowness_of_a_kind_of_its_group_and_of_all():
    """If this fails, what was never measured is taken to be as fast as ever on a busy machine, or far too slow."""
    slowness = Slowness(size=8, trusted=2)
    assert slowness.value("a", 1) == 1.0
    for ratio in (2.0, 2.0):
        slowness.learn("a", 1, ratio)
    assert slowness.value("a", 1) == 2.0
    assert slowness.value("a", 2) == slowness.value("b", 1) == pytest.approx(2.0**SHARED)
    slowness.learn("b", 1, 4.0)
    assert slowness.value("a", 1) == 2.0 < slowness.value("b", 2) < slowness.value("b", 1) < 4.0
