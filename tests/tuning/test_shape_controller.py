"""Choosing while a text is written, on a made-up device whose clock the tests hold."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from support import RANDOM, REPEATING, make_drafter, make_model, plainly
from support.costs import made_up
from support.made_up_device import COSTS, Device

from mlx_redrafter.decoding.loop import speculative
from mlx_redrafter.decoding.planner import StepRead
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.lookup import LookupProposer, TextIndex
from mlx_redrafter.drafting.proposers import RecurrentProposer
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, Forced, LookedUp
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.tuning.acceptance_model import DEPTHS, AcceptanceModel
from mlx_redrafter.tuning.lookup_controller import LookupController
from mlx_redrafter.tuning.session import SHAPES
from mlx_redrafter.tuning.shape_controller import Controller, PairMemory

PLANS = [PLAIN, *map(Drafted, SHAPES)]
CHAIN, TREE = Drafted(DraftShape()), Drafted(DraftShape(4, 5, 7))
JOINED = Drafted(TREE.shape, with_lookup=True)


def new_memory(costs=COSTS, plans=PLANS):
    return PairMemory(costs, AcceptanceModel(), plans)


def choice(memory):
    """What a text that begins now is drafted for with."""
    return Controller(memory).current.plan


def seconds(memory, plan):
    return memory.seconds(memory.arm(plan), 128)


@pytest.mark.parametrize("seed", range(4))
def test_a_useless_drafter_costs_little(seed):
    """If this fails, auto is slower than decoding without the drafter by more than it may be."""
    device = Device(new_memory(), seed=seed)
    assert choice(device.memory) != PLAIN
    plain = 1.025
    seconds = [device.write(128, 0.0) / (128 * plain) for _ in range(20)]
    assert seconds[0] < 1.08  # finding out
    assert np.mean(seconds) < 1.025 and np.mean(seconds[4:]) < 1.02
    assert any(plan != PLAIN for plan in device.plans[-1500:])  # it still looks now and then


@pytest.mark.parametrize("quality", [0.4, 0.7, 0.9])
def test_close_to_the_best_fixed_shape(quality):
    device = Device(new_memory())
    device.write(1000, quality)
    speed = 4000 / device.write(4000, quality)
    best = max(device.speed_of(plan, quality) for plan in PLANS if plan != PLAIN)
    assert speed > 0.95 * best


def test_goes_plain_when_drafts_fail_and_comes_back():
    device = Device(new_memory())
    device.write(500, 0.75)
    assert device.controller.current.plan != PLAIN
    device.write(300, 0.0)
    assert device.controller.current.plan == PLAIN
    device.write(1500, 0.75)
    assert device.controller.current.plan != PLAIN
    assert 1000 / device.write(1000, 0.75) > 1.5


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


def test_a_text_begins_where_the_last_one_ended():
    """If this fails, every text finds out anew what is drafted best; or one that decoded plainly leaves that behind."""
    device = Device(new_memory())
    device.write(1500, 0.9)
    assert choice(device.memory) == device.controller.current.plan == device.memory.current.plan
    device.memory.current = device.memory.arm(CHAIN)
    assert choice(device.memory) == CHAIN
    device.write(1500, 0.0)
    assert device.controller.current.plan == PLAIN and device.memory.current is None
    by_all_texts = Controller(device.memory)
    assert by_all_texts.current == max(device.memory.arms, key=lambda arm: by_all_texts.rate(0, arm))


def test_a_clock_that_stands_still():
    """If this fails, a coarse clock, or one of tests, ends a text."""
    memory = new_memory()
    controller = Controller(memory, clock=iter([5.0] * 20 + [4.0] * 20).__next__)
    for _ in range(40):
        controller.learn(StepRead(controller.plan(), [1, 1], 128))
    assert [memory.slowness.of(arm.kind) for arm in memory.arms] == [1.0] * len(memory.arms)


def test_few_changes_of_shape():
    """A drafter of one quality is drafted for with one shape, but for trials."""
    device = Device(new_memory())
    device.write(6000, 0.7)
    changes = sum(a != b for a, b in itertools.pairwise(device.plans))
    assert changes < len(device.plans) / 25


def test_the_made_up_device_is_the_formula():
    """The device and the expectation agree on chains and trees; else the tests above test nothing."""
    device, model = Device(new_memory()), AcceptanceModel([0.7] * DEPTHS)
    for plan in PLANS[1:]:
        assert isinstance(plan, Drafted)
        formula = (1 + model.expected(plan.shape)) / COSTS.step_seconds(plan, 128) / 1.025
        assert device.speed_of(plan, 0.7) == pytest.approx(formula, rel=0.03)


@pytest.mark.parametrize("quality", [0.25, 0.4, 0.6, 0.75, 0.85])
def test_few_shapes_serve_drafters_of_any_quality(quality):
    """If this fails, a drafter that turns out otherwise than assumed is left with a shape far from its best."""
    costs = made_up(lambda rows: 1 + 0.06 * rows, lambda w, n: (0.03 + 0.01 * w) * (n - 1), plain=1.0)
    model = AcceptanceModel([quality] * DEPTHS)

    def best(shapes):
        return max((1 + model.expected(shape)) / costs.step_seconds(Drafted(shape), 128) for shape in shapes)

    every = [
        DraftShape(width, length, nodes)
        for width in (1, 2, 3, 4, 6, 8)
        for length in range(2, 10)
        for nodes in range(length - 1, min(31, width * (length - 1)) + 1)
    ]
    assert best(SHAPES) > 0.95 * best(every)


def test_what_to_begin_with_goes_by_costs():
    """If this fails, the first text on a device is drafted for as if it were another device."""

    def first(row_seconds, draft=lambda w, n: 0.01 * (n - 1)):
        return choice(new_memory(made_up(row_seconds, draft)))

    free = first(lambda rows: 1.0)  # rows cost nothing: a large tree
    assert free.shape.beam_width > 1 and free.shape.num_draft_tokens == max(s.num_draft_tokens for s in SHAPES)
    # As on MLX's own BLAS, or quantised on M1 and M2: every row reads all weights again.
    assert first(lambda rows: float(rows)) == PLAIN
    # A drafter that is slow makes shorter drafts.
    fast, slow = (first(lambda r: 1 + 0.02 * r, lambda w, n, s=s: s * (n - 1)) for s in (0.0, 0.4))
    assert slow.shape.beam_length < fast.shape.beam_length


def test_a_tree_ends_before_the_step_in_its_cost():
    """As on an M2 Ultra, whose step of 16 rows takes 81 ms where one of 15 takes 43."""
    costs = made_up(lambda rows: 0.0)
    costs.verify[128] = {rows: 0.040 + 0.0002 * rows if rows <= 15 else 0.081 for rows in (*range(1, 17), 24, 32)}
    costs.plain[128], costs.draft = 0.04, {w: {2: 0.0005, 5: 0.002} for w in (1, 2, 4, 8)}
    assert choice(new_memory(costs)) == Drafted(DraftShape(4, 5, 12))


def test_rows_of_a_grammar_end_before_the_step_too():
    """If this fails, what a grammar forces takes rows that cost more than they bring, or leaves out those that pay."""
    memory = new_memory(made_up(lambda rows: 1 + 0.02 * rows + (rows > 15)))
    odds = Controller(memory).odds()
    assert all(0 < least < 0.1 for least in odds.least[1:12]) and min(odds.least[12:16]) > 0.4  # 12 to 16 is one slope
    assert odds.right == tuple(memory.acceptance.shares()[0])


def test_what_a_grammar_forces_is_no_plans_merit():
    """If this fails, a plan is thought to bring what comes without it, too, and is used where it does not pay."""
    memory, now, plans = new_memory(plans=[PLAIN, CHAIN]), 0.0, []
    memory.structured = True
    assert choice(memory) == CHAIN
    controller, pauses = Controller(memory, clock=lambda: now), []
    memory.slowness.pause = lambda: pauses.append(now)
    controller.learn(StepRead(Forced(5), [1] * 6, 128, forced=range(5)))
    for _ in range(400):
        plans.append(controller.plan())
        now += COSTS.step_seconds(plans[-1], 128)
        tokens, forced = ([1] * 4, [0, 1, 2]) if plans[-1] == CHAIN else ([1], [])
        controller.learn(StepRead(plans[-1], tokens, 128, forced=forced))
        before = state(memory)
        now += 50.0  # of a step that is the grammar's alone
        controller.learn(StepRead(Forced(5), [1] * 6, 128, forced=range(5)))
        assert state(memory) == before
    assert len(pauses) == 1 and pauses[0] > 0  # the first step that somebody drafted
    assert choice(memory) == PLAIN and CHAIN in plans[40:] and plans[40:].count(CHAIN) < 40  # tried in vain
    assert Controller(memory).tokens(memory.arm(CHAIN)) < 1.3 and memory.acceptance.first[0].tries == 0


def state(memory):
    return (
        memory.acceptance.to_dict(),
        choice(memory),
        memory.spent,
        [memory.seconds(arm, 128) for arm in memory.arms],
        [arm.fit.share(1.0) for arm in memory.arms],
    )


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


def test_a_random_drafter_ends_in_plain_decoding():
    """The same through the real loop, its clock aside: nothing is accepted, so plain steps it is."""
    model, drafter = make_model(), make_drafter()
    memory, tokens = new_memory(), []
    verifier = verifier_of(model)
    proposer, now = RecurrentProposer(drafter, verifier.target.embed), itertools.count()
    controller = Controller(memory, clock=lambda: next(now))
    memory.slowness.learn = lambda *_: None  # only acceptance counts
    options = DecodingOptions(max_tokens=100)
    for produced in speculative(verifier, proposer, mx.array([[1, 2, 3]]), verifier.make_cache(), options, controller):
        tokens += produced.tokens
    assert tokens[:100] == plainly(model, [1, 2, 3], 100)
    assert controller.current.plan == PLAIN


def test_lookup_is_asked_what_the_step_drafts():
    """If this fails, a text that repeats itself is drafted for as any other."""
    memory = new_memory()
    asked = []

    class Found:
        def plan(self, plan, length, speed_of):
            assert speed_of(128) > 0
            asked.append((plan, length))
            return LookedUp(5)

        def learn(self, step):
            asked.append(step)

    controller = Controller(memory, Found(), clock=lambda: 0.0)
    assert controller.plan() == LookedUp(5) and asked == [(choice(memory), 0)]
    step = StepRead(LookedUp(5), RANDOM[:3], 77)
    controller.learn(step)
    assert asked[-1] is step
    assert controller.plan() == LookedUp(5) and asked[-1] == (choice(memory), 77)
