"""Lookups are chosen where they have been right, as far as that pays, and join trees where they should reach."""

import functools

import numpy as np
import pytest
from support import REPEATING

from mlx_redrafter.decoding.planner import StepRead
from mlx_redrafter.drafting.lookup import TextIndex
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, LookedUp
from mlx_redrafter.tuning.lookup_controller import ASSUMED, DEEPEST, LookupController, LookupMemory

CHAIN, TREE = Drafted(DraftShape()), Drafted(DraftShape(4, 5, 7))
JOINED = Drafted(TREE.shape, with_lookup=True)
AGAIN = list(range(10)) * 400
FRESH = np.random.default_rng(0).integers(10_000, size=600).tolist()


class Device:
    """Every row beyond the first costs a tenth of a step."""

    def __init__(self, tokens, slow_lookup=1.0):
        self.tokens, self.slow_lookup = tokens, slow_lookup

    def seconds(self, tokens, length):
        return 1 + 0.1 * tokens * self.slow_lookup

    def speed(self, length):
        return self.tokens / 1.3


def started(prompt, device, mode="auto", memory=None, longest=DEEPEST):
    found = LookupController(TextIndex(prompt), mode, memory or LookupMemory(), device.seconds, longest)
    found.plan = functools.partial(found.plan, speed_of=device.speed)
    return found


def decode(controller, text, steps, accepts, plan=CHAIN):
    """Plays steps over a text; `accepts` of the drafter's tokens in each. Returns the plans."""
    found = []
    for _ in range(steps):
        chosen = controller.plan(plan, len(controller.index.tokens))
        lookups = isinstance(chosen, LookedUp) or (isinstance(chosen, Drafted) and chosen.with_lookup)
        lookup = controller.index.continuation(chosen.num_draft_tokens) if lookups else []
        at = len(controller.index.tokens)
        right = next((i for i, token in enumerate(lookup) if text[at + i] != token), len(lookup))
        accepted = right if isinstance(chosen, LookedUp) else max(accepts, right)
        tokens = text[at : at + accepted + 1]
        controller.index.extend(tokens)
        controller.learn(StepRead(chosen, tokens, at + len(tokens)))
        found.append(chosen)
    return found


def lookups(plans):
    return [isinstance(plan, LookedUp) for plan in plans]


def test_looks_as_far_as_it_pays():
    """If this fails, long repetitions are gone through a few tokens at a time, or guesses are long ones."""
    text = FRESH[:40] + AGAIN[:3000]
    found = decode(started(text[:20], Device(2.0)), text, 140, accepts=1)
    assert set(found[:10]) == {CHAIN}  # nothing was there before
    lengths = [plan.num_draft_tokens for plan in found if isinstance(plan, LookedUp)]
    assert lengths[0] < 15 and set(lengths[-20:]) == {15}
    # What a shape that is only being tried would bring is of no matter to the choice.
    assert not any(lookups(decode(started(AGAIN[:20], Device(30.0)), AGAIN, 20, accepts=0, plan=PLAIN)))
    assert not any(lookups(decode(started(text[:20], Device(30.0)), text, 140, accepts=1)))


def test_weighs_gain_against_cost():
    """If this fails, auto looks up where that costs speed, or does not where it brings some."""
    assert all(lookups(decode(started(AGAIN[:20], Device(2.0)), AGAIN, 60, accepts=1))[-40:])
    dear = Device(2.0, slow_lookup=10.0)
    assert not any(lookups(decode(started(AGAIN[:20], dear), AGAIN, 90, accepts=1)))
    assert not any(lookups(decode(started(FRESH[:20], Device(1.0)), FRESH, 60, accepts=1)))


def test_follows_the_text():
    """If this fails, lookup stays on after the text has stopped repeating itself, or never comes back."""
    text = AGAIN[:300] + FRESH[:400] + AGAIN[:2000]
    controller, found, at = started(text[:20], Device(2.0), longest=3), [], []
    for _ in range(500):
        at.append(len(controller.index.tokens))
        found += lookups(decode(controller, text, 1, accepts=1))
    shares = [
        np.mean([one for place, one in zip(at, found, strict=True) if low < place < high])
        for low, high in ((100, 290), (310, 700), (740, max(at)))
    ]
    assert min(shares[0], shares[2]) > 0.8 and shares[1] == 0 and max(at) > 1200


def test_no_longer_than_allowed():
    """If this fails, a fixed shape is no limit to lookup alone."""
    found = decode(started(AGAIN[:20], Device(1.0), longest=3), AGAIN, 40, accepts=0, plan=PLAIN)
    assert set(found[-20:]) == {LookedUp(3)}


def test_joins_trees():
    """If this fails, auto never puts a branch into a tree, or does where lookup should say nothing right."""
    device = Device(2.0, slow_lookup=100.0)
    found = decode(started(AGAIN[:20], device), AGAIN, 80, accepts=1, plan=TREE)
    assert set(found[-32:]) == {JOINED}
    assert set(decode(started(FRESH[:20], device), FRESH, 80, accepts=1, plan=TREE)) == {TREE}
    # A chain is replaced as a whole or not at all.
    assert set(decode(started(AGAIN[:20], device), AGAIN, 80, accepts=1, plan=CHAIN)) == {CHAIN}
    # Lookups that are always wrong, however much the text looks like one that repeats itself.
    memory = LookupMemory()
    for kind in range(len(ASSUMED)):
        for _ in range(200):
            memory.learn(kind, 0)
    assert started(AGAIN[:20], device, memory=memory).plan(TREE, 20) == TREE


def test_on_is_wherever_something_is_found():
    """If this fails, "on" leaves lookups out, or a step that can find nothing pays for rows."""
    device = Device(30.0, slow_lookup=100.0)  # however little it pays
    repeating, fresh = (started(text, device, mode="on", longest=3) for text in (REPEATING, list(range(20))))
    assert repeating.plan(PLAIN, 35) == LookedUp(3) and fresh.plan(PLAIN, 20) == PLAIN
    for controller in (repeating, fresh):  # the device looks, whatever the host knows so far
        assert controller.plan(TREE, 35) == JOINED
        assert controller.plan(CHAIN, 35) == Drafted(CHAIN.shape, with_lookup=True)


def test_what_lookups_brought_outlives_texts():
    """If this fails, every text finds out again what lookup is worth."""
    memory, dear = LookupMemory(), Device(3.5)  # what is assumed of lookups does not pay, what is seen of them does
    fresh = lookups(decode(started(AGAIN[:20], dear, memory=memory), AGAIN, 60, 1))
    after = lookups(decode(started(AGAIN[:20], dear, memory=memory), AGAIN, 60, 1))
    assert not fresh[0] and all(fresh[-20:]) and all(after)


def test_expected_tokens():
    """If this fails, what lookups bring is added up wrongly."""
    memory = LookupMemory()
    for kind, assumed in enumerate(ASSUMED):
        right = memory.expected(kind)
        assert len(right) == DEEPEST + 1 and right[0] == 0
        assert right[2] == pytest.approx(assumed + assumed**2)
    for _ in range(2000):
        memory.learn(3, 4)
    assert memory.expected(3)[15] == pytest.approx(4, abs=0.3)
    assert memory.expected(2)[15] == pytest.approx(sum(ASSUMED[2] ** n for n in range(1, 16)))


def test_what_a_grammar_forces_needs_no_lookup():
    """If this fails, a text with much that is fixed is looked up where the grammar brings the same."""
    controller = started(AGAIN[:20], Device(2.0))
    before = controller.memory.expected(controller.kind)
    for _ in range(40):  # ten free tokens, of which a lookup brings only those behind the root, and ten forced ones
        text = controller.index.tokens
        controller.index.extend(AGAIN[len(text) : len(text) + 20])
        controller.learn(StepRead(Drafted(DraftShape()), AGAIN[:20], len(text), forced=range(10), certain=10))
    found = controller.memory.expected(len(ASSUMED) - 1)
    assert before[DEEPEST] > 3 and found[10] < 1 and found[DEEPEST] == pytest.approx(found[10] + 5, abs=0.5)


def test_only_what_the_text_has_gone_past_is_judged():
    """If this fails, a lookup counts as wrong where the text has not got that far, or counts twice."""
    learnt = []
    controller = started(AGAIN[:20], Device(2.0))
    controller.memory.learn = lambda kind, right, forced: learnt.append(right)
    decode(controller, AGAIN, 1, accepts=0, plan=PLAIN)
    assert learnt == []  # the first lookup is of what comes after this step
    before = len(controller.index.tokens)
    text = [*AGAIN[: before + 6], 999]
    for token in text[before : before + 6]:
        controller.index.extend([token])
    controller.learn(StepRead(PLAIN, text[before : before + 6], before + 6))
    assert learnt == []  # six of fifteen, all right so far
    controller.index.extend([999])
    controller.learn(StepRead(PLAIN, [999], before + 7))
    assert learnt == [6, 0]
