"""Choosing while a text is written: shapes on a made-up device whose clock the tests hold, lookups where they pay."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from support import RANDOM, REPEATING, make_drafter, make_model, plainly
from support.costs import made_up
from support.lookups import AGAIN, FRESH, Rates, decode, lookups, started
from support.made_up_device import COSTS, PLANS, Device, choice, new_memory

from mlx_redrafter.decoding.loop import speculative
from mlx_redrafter.decoding.planner import StepRead
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.proposers import RecurrentProposer
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, Forced, LookedUp
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.tuning.acceptance_model import DEPTHS, LOOKUP_ASSUMED, AcceptanceModel, LookupMemory
from mlx_redrafter.tuning.session import SHAPES
from mlx_redrafter.tuning.shape_controller import Controller

CHAIN, TREE = Drafted(DraftShape()), Drafted(DraftShape(4, 5, 7))
JOINED = Drafted(TREE.shape, with_lookup=True)


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


def test_a_random_drafter_ends_in_plain_decoding():
    """Through the real loop, its clock aside: nothing is accepted, so plain steps it is."""
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


def test_looks_up_as_far_as_it_pays():
    """If this fails, long repetitions are gone through a few tokens at a time, or guesses are long ones."""
    text = FRESH[:40] + AGAIN[:3000]
    found = decode(started(text[:20], Rates(2.0)), text, 140, accepts=1)
    assert set(found[:10]) == {CHAIN}  # nothing was there before
    lengths = [plan.num_draft_tokens for plan in found if isinstance(plan, LookedUp)]
    assert lengths[0] < 15 and set(lengths[-20:]) == {15}
    # What a shape that is only being tried would bring is of no matter to the choice.
    assert not any(lookups(decode(started(AGAIN[:20], Rates(30.0)), AGAIN, 20, accepts=0, plan=PLAIN)))
    assert not any(lookups(decode(started(text[:20], Rates(30.0)), text, 140, accepts=1)))


def test_lookup_weighs_gain_against_cost():
    """If this fails, auto looks up where that costs speed, or does not where it brings some."""
    assert all(lookups(decode(started(AGAIN[:20], Rates(2.0)), AGAIN, 60, accepts=1))[-40:])
    dear = Rates(2.0, slow_lookup=10.0)
    assert not any(lookups(decode(started(AGAIN[:20], dear), AGAIN, 90, accepts=1)))
    assert not any(lookups(decode(started(FRESH[:20], Rates(1.0)), FRESH, 60, accepts=1)))


def test_lookup_follows_the_text():
    """If this fails, lookup stays on after the text has stopped repeating itself, or never comes back."""
    text = AGAIN[:300] + FRESH[:400] + AGAIN[:2000]
    controller, found, at = started(text[:20], Rates(2.0), longest=3), [], []
    for _ in range(500):
        at.append(len(controller.index.tokens))
        found += lookups(decode(controller, text, 1, accepts=1))
    shares = [
        np.mean([one for place, one in zip(at, found, strict=True) if low < place < high])
        for low, high in ((100, 290), (310, 700), (740, max(at)))
    ]
    assert min(shares[0], shares[2]) > 0.8 and shares[1] == 0 and max(at) > 1200


def test_lookups_are_no_longer_than_allowed():
    """If this fails, a fixed shape is no limit to lookup alone."""
    found = decode(started(AGAIN[:20], Rates(1.0), longest=3), AGAIN, 40, accepts=0, plan=PLAIN)
    assert set(found[-20:]) == {LookedUp(3)}


def test_lookup_joins_trees():
    """If this fails, auto never puts a branch into a tree, or does where lookup should say nothing right."""
    rates = Rates(2.0, slow_lookup=100.0)
    found = decode(started(AGAIN[:20], rates), AGAIN, 80, accepts=1, plan=TREE)
    assert set(found[-32:]) == {JOINED}
    assert set(decode(started(FRESH[:20], rates), FRESH, 80, accepts=1, plan=TREE)) == {TREE}
    # A chain is replaced as a whole or not at all.
    assert set(decode(started(AGAIN[:20], rates), AGAIN, 80, accepts=1, plan=CHAIN)) == {CHAIN}
    # Lookups that are always wrong, however much the text looks like one that repeats itself.
    memory = LookupMemory()
    for kind in range(len(LOOKUP_ASSUMED)):
        for _ in range(200):
            memory.learn(kind, 0)
    assert started(AGAIN[:20], rates, memory=memory).plan(TREE, 20) == TREE


def test_lookup_on_is_wherever_something_is_found():
    """If this fails, "on" leaves lookups out, or a step that can find nothing pays for rows."""
    rates = Rates(30.0, slow_lookup=100.0)  # however little it pays
    repeating, fresh = (started(text, rates, mode="on", longest=3) for text in (REPEATING, list(range(20))))
    assert repeating.plan(PLAIN, 35) == LookedUp(3) and fresh.plan(PLAIN, 20) == PLAIN
    for controller in (repeating, fresh):  # the device looks, whatever the host knows so far
        assert controller.plan(TREE, 35) == JOINED
        assert controller.plan(CHAIN, 35) == Drafted(CHAIN.shape, with_lookup=True)


def test_what_lookups_brought_outlives_texts():
    """If this fails, every text finds out again what lookup is worth."""
    memory, dear = LookupMemory(), Rates(3.5)  # what is assumed of lookups does not pay, what is seen of them does
    fresh = lookups(decode(started(AGAIN[:20], dear, memory=memory), AGAIN, 60, 1))
    after = lookups(decode(started(AGAIN[:20], dear, memory=memory), AGAIN, 60, 1))
    assert not fresh[0] and all(fresh[-20:]) and all(after)
