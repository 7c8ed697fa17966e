"""What is the machine's and what is a plan's own, where both make steps take longer than computed."""

import math

import pytest

from mlx_redrafter.tuning.slowness import TOGETHER, Slowness

OWN = 0.3


def steps(slowness, plan, ratio, looks=4):
    for _ in range(looks * TOGETHER):
        slowness.learn(plan, ratio, OWN)


def beside(slowness, plan, other):
    return slowness.of(plan) / slowness.of(other)


def test_a_plan_is_known_by_how_it_compares():
    """If this fails, a plan that was in use while the machine was slow counts as slow ever after."""
    slowness = Slowness()
    for _ in range(3):
        steps(slowness, "plain", 1.1)
        steps(slowness, "chain", 1.65)
    assert beside(slowness, "chain", "plain") == pytest.approx(1.5, rel=0.1)
    steps(slowness, "chain", 3.3, looks=20)  # the machine has become slow
    assert beside(slowness, "chain", "plain") == pytest.approx(1.5, rel=0.1)
    for _ in range(3):
        steps(slowness, "longer", 6.6)
        steps(slowness, "chain", 3.3)
    assert beside(slowness, "longer", "chain") == pytest.approx(2.0, rel=0.1)
    assert beside(slowness, "chain", "plain") == pytest.approx(1.5, rel=0.1)


def test_short_trials_mislead_nobody():
    """If this fails, the plan in use looks fast for having been compared with a slow one."""
    slowness = Slowness()
    steps(slowness, "plain", 1.0)
    steps(slowness, "chain", 1.2)
    before = beside(slowness, "chain", "plain")
    for _ in range(5):
        steps(slowness, "longer", 2.4, looks=1)
        steps(slowness, "chain", 1.2)
    assert beside(slowness, "chain", "plain") == pytest.approx(before, rel=0.1)
    assert beside(slowness, "longer", "chain") == pytest.approx(2.0, rel=0.1)


def test_a_spell_that_begins_with_a_trial_is_found_out_behind_it():
    """If this fails, a plan is given up because the machine became slow just when it was tried."""
    slowness = Slowness()
    steps(slowness, "chain", 1.0, looks=20)
    steps(slowness, "longer", 1.5, looks=1)
    suspected = beside(slowness, "longer", "chain")
    steps(slowness, "chain", 1.5)  # this one is as slow meanwhile
    assert suspected > 1.15 and beside(slowness, "longer", "chain") < 1 + (suspected - 1) / 2


def test_a_plan_alone_is_as_slow_as_the_machine():
    """If this fails, plans that were never tried look fast on a machine that is slow, or the only one that was fast."""
    slowness = Slowness()
    assert slowness.of("chain") == slowness.at_best("plain") == 1.0
    steps(slowness, "chain", 2.0, looks=20)
    assert 1.0 < slowness.of("chain") < 1.15 and slowness.of("plain") == 1.0
    assert slowness.at_best("plain") == pytest.approx(1 / 2.0, rel=0.15)  # perhaps it is the chain that is slow
    assert slowness.at_best("chain") == slowness.of("chain")
    steps(slowness, "plain", 2.0)
    assert slowness.at_best("plain") == slowness.of("plain") == pytest.approx(1.0, rel=0.1)


def test_one_step_that_waited_does_not_count():
    """If this fails, a step that waited for another program makes its plan look slow."""
    slowness = Slowness()
    for _ in range(20):
        for ratio in (1.0, 500.0, 1.0, 1.0):
            slowness.learn("chain", ratio, OWN)
    assert slowness.of("chain") == pytest.approx(1.0) and slowness.at_best("plain") == pytest.approx(1.0)


def test_the_last_steps_before_another_plan_count_together_or_not_at_all():
    """If this fails, a trial's last step, which waits for another plan's, makes what was tried look slow."""
    slowness = Slowness()
    steps(slowness, "chain", 1.0)
    for ratio in (1.0, 1.0, 1.0, 1.0, 1.0, 2.3):
        slowness.learn("plain", ratio, OWN)
    steps(slowness, "chain", 1.0)
    assert beside(slowness, "plain", "chain") == pytest.approx(1.0)


def test_texts_that_take_turns():
    """If this fails, two texts with plans of their own, step by step in turn, teach nothing."""
    slowness = Slowness()
    for _ in range(40):
        slowness.learn("plain", 1.0, OWN)
        slowness.learn("chain", 1.5, OWN)
    assert beside(slowness, "chain", "plain") == pytest.approx(1.5, rel=0.1)


def test_steps_of_long_ago_are_not_looked_at():
    """If this fails, what was left of a trial is taken for what the machine is like much later."""
    slowness = Slowness()
    steps(slowness, "chain", 1.0)
    for _ in range(2):
        slowness.learn("longer", 3.0, OWN)
    steps(slowness, "chain", 1.0, looks=5)
    steps(slowness, "longer", 1.0, looks=2)
    assert beside(slowness, "longer", "chain") == pytest.approx(1.0)


def test_however_long_a_reader_pauses():
    """If this fails, a reader who comes back an hour later finds a plan given up."""

    def after(ratio):
        slowness = Slowness()
        for _ in range(3):
            steps(slowness, "plain", 1.0)
            steps(slowness, "chain", 1.0)
        steps(slowness, "chain", ratio, looks=1)
        return beside(slowness, "chain", "plain")

    assert after(1e6) == pytest.approx(after(1e3)) and after(1e6) < 1.3


def test_what_is_the_same_for_all_after_a_pause():
    """If this fails, the plan that happens to be in use when a batch grows is blamed for what all plans take."""

    def blamed(pauses):
        slowness = Slowness()
        steps(slowness, "plain", 1.0)
        steps(slowness, "chain", 1.0)
        if pauses:
            slowness.pause()
        steps(slowness, "chain", 1.4, looks=1)
        return math.log(beside(slowness, "chain", "plain"))

    assert 0 <= blamed(True) < 0.6 * blamed(False)
