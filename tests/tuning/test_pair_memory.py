"""What steps of a pair take: what is the machine's and what is a plan's own, and what steps tell nothing of."""

import math

import mlx.core as mx
import pytest
from support import REPEATING, make_drafter, make_model, plainly
from support.costs import made_up
from support.made_up_device import COSTS, Device, choice, new_memory

from mlx_redrafter.decoding.loop import speculative
from mlx_redrafter.decoding.planner import StepRead
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.lookup import LookupProposer, TextIndex
from mlx_redrafter.drafting.proposers import RecurrentProposer
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, LookedUp
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.tuning.pair_memory import TOGETHER, Slowness
from mlx_redrafter.tuning.shape_controller import Controller, LookupController

OWN = 0.3
TREE = Drafted(DraftShape(4, 5, 7))
JOINED = Drafted(TREE.shape, with_lookup=True)


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


def seconds(memory, plan):
    return memory.seconds(memory.arm(plan), 128)


def test_believes_the_clock_more_than_the_table():
    """Drafted steps take three times what was measured beforehand, as when another program holds the cores."""
    true = made_up(lambda rows: 1 + 0.05 * (rows - 1), lambda w, n: 3.0, plain=1.0)
    device = Device(new_memory(), true)
    device.write(1500, 0.7)
    assert device.controller.current.plan == PLAIN
    # And the other way round: nothing should pay, but it does.
    device = Device(new_memory(made_up(lambda rows: float(rows))))
    assert choice(device.memory) == PLAIN
    device.write(2000, 0.8)
    assert device.controller.current.plan != PLAIN


def test_pauses_of_the_reader_are_no_slow_steps():
    device = Device(new_memory())
    device.write(400, 0.7)
    before = seconds(device.memory, device.controller.current.plan)
    device.write(800, 0.7, pause=lambda: 50.0 if device.rng.random() < 0.2 else 0.0)
    assert device.controller.current.plan != PLAIN
    assert seconds(device.memory, device.controller.current.plan) < 1.2 * before


def test_a_clock_that_stands_still():
    """If this fails, a coarse clock, or one of tests, ends a text."""
    memory = new_memory()
    controller = Controller(memory, clock=iter([5.0] * 20 + [4.0] * 20).__next__)
    for _ in range(40):
        controller.learn(StepRead(controller.plan(), [1, 1], 128))
    assert [memory.slowness.of(arm.kind) for arm in memory.arms] == [1.0] * len(memory.arms)


def test_lookups_tell_nothing_of_the_drafter():
    """If this fails, a text that repeats itself makes the drafter look better, or its steps slower."""
    device = Device(new_memory())
    device.write(500, 0.7)
    memory = device.memory
    controller = Controller(memory, clock=lambda: device.now)
    before = memory.acceptance.to_dict(), memory.spent, [arm.fit.share(1.0) for arm in memory.arms]
    times = [memory.seconds(arm, 128) for arm in memory.arms]
    expected = COSTS.step_seconds(LookedUp(7), 128)
    for _ in range(40):
        device.now += 1.5 * expected
        controller.learn(StepRead(LookedUp(7), [1] * 8, 128))
    assert (memory.acceptance.to_dict(), memory.spent, [arm.fit.share(1.0) for arm in memory.arms]) == before
    assert [memory.seconds(arm, 128) for arm in memory.arms] == pytest.approx(times, rel=0.05)
    # Their own time is learnt, whatever their length.
    assert 1.15 * expected < memory.lookup_seconds(7, 128) < 1.55 * expected
    slower = memory.lookup_seconds(3, 128) / COSTS.step_seconds(LookedUp(3), 128)
    assert slower == pytest.approx(memory.lookup_seconds(7, 128) / expected)


def test_trees_that_lookup_joined_tell_nothing_of_the_drafter():
    """If this fails, tokens that lookup got right count as the drafter's best, or wrong ones as its worst."""
    memory = new_memory(plans=[PLAIN, TREE])
    controller, now = Controller(memory, clock=lambda: now), 0.0
    before = memory.acceptance.to_dict(), memory.arm(TREE).fit.tries, seconds(memory, TREE), memory.spent
    for _ in range(40):
        now += 9.0
        controller.learn(StepRead(JOINED, [1] * 5, 128, path=[0, 5, 6, 7], parents=[0, 0, 1, 2, 3, 0, 5, 6]))
    after = memory.acceptance.to_dict(), memory.arm(TREE).fit.tries, seconds(memory, TREE), memory.spent
    assert after == before and memory.steps == 40


def test_through_the_real_loop_joined_trees_teach_nothing():
    """The same of steps that were made: a text that repeats itself, trees that lookup joins, a random drafter."""
    model, drafter = make_model(), make_drafter()
    verifier, index = verifier_of(model), TextIndex(REPEATING)
    memory = new_memory(plans=[TREE])
    found = LookupController(index, "on", memory.lookup, memory.lookup_seconds)
    proposer = LookupProposer(RecurrentProposer(drafter, verifier.target.embed), index)
    options, tokens, plans, before = DecodingOptions(max_tokens=60), [], set(), memory.acceptance.to_dict()
    for produced in speculative(
        verifier, proposer, mx.array([REPEATING]), verifier.make_cache(), options, Controller(memory, found)
    ):
        tokens += produced.tokens
        plans.add(produced.plan)
    assert tokens[:60] == plainly(model, REPEATING, 60)
    assert plans == {PLAIN, JOINED} and memory.acceptance.to_dict() == before  # PLAIN: the prompt's token
