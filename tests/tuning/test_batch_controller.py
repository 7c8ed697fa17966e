import pytest
from support.costs import made_up

from mlx_redrafter.decoding.planner import StepRead
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, LookedUp, Plan
from mlx_redrafter.tuning.acceptance_model import AcceptanceModel
from mlx_redrafter.tuning.batch_controller import (
    BURST,
    FIRST_GAP,
    LARGEST_GAP,
    BatchController,
    BatchMemory,
    rounded,
)
from mlx_redrafter.tuning.pair_memory import kind_of

CHAINS = [Drafted(DraftShape(1, n + 1, n)) for n in (1, 3, 7)]


class Device:
    """Eight rows cost what one costs, more of them more; a clock that steps move on.

    Args:
        slower: than computed, by plan.
    """

    def __init__(self, slower=None):
        self.now, self.slower = 0.0, slower or {}
        self.costs = made_up(lambda rows: max(1.0, rows / 8), draft=lambda width, length: 0.0)

    def run(self, controller, texts, steps, right=9):
        """What was drafted in each of so many steps, of which so many drafts were right at most."""
        plans: list[Plan] = []
        for _ in range(steps):
            plan = controller.plan(texts, 100)
            self.now += self.costs.batch_seconds(plan, texts, 100) * self.slower.get(plan, 1.0)
            got = min(right, plan.num_draft_tokens)
            controller.learn([StepRead(plan, [5] * (got + 1), 100) for _ in range(texts)])
            plans.append(plan)
        return plans


def controller_on(device, known=None, right=0.7):
    known, acceptance = {} if known is None else known, AcceptanceModel([right] * 7)
    return BatchController(acceptance, CHAINS, device.costs, known, clock=lambda: device.now)


def test_more_texts_get_fewer_drafts():
    """If this fails, drafts take rows that other texts would use better, or rows that cost nothing stay unused."""
    controller = controller_on(Device())
    chosen = [controller.plan(texts, 100).num_draft_tokens for texts in (1, 2, 4, 8, 16, 40)]
    assert chosen == sorted(chosen, reverse=True) and chosen[0] == 7 and chosen[2] == 1 and chosen[-1] == 0


def test_plain_is_the_floor_and_comes_to_an_end():
    """If this fails, a batch drafts in vain, or never learns that a text has become easy."""
    device = Device(slower=dict.fromkeys(CHAINS, 1.3))
    controller = controller_on(device)
    device.run(controller, 8, 200, right=0)
    plans = device.run(controller, 8, LARGEST_GAP, right=0)
    assert 0 < sum(plan != PLAIN for plan in plans) <= 3 * BURST
    easy = device.run(controller, 2, 4 * LARGEST_GAP)
    assert sum(plan == PLAIN for plan in easy[-LARGEST_GAP:]) <= 8 * BURST


def test_short_batches_do_not_try_again_and_again():
    """If this fails, writing a few short texts at a time costs a trial each time."""
    device, known = Device(slower=dict.fromkeys(CHAINS, 1.3)), {}
    device.run(controller_on(device, known), 8, 10 * FIRST_GAP, right=0)
    plans = []
    for _ in range(6):
        plans += device.run(controller_on(device, known, right=0.3), 8, 2 * FIRST_GAP, right=0)
    assert 0 < sum(plan != PLAIN for plan in plans) <= 2 * BURST


def test_times_of_the_steps_count():
    """If this fails, what was computed decides, however long steps take."""
    device = Device(slower={CHAINS[2]: 20.0})
    known = {}
    assert controller_on(device, known).plan(1, 100) == CHAINS[2]
    assert device.run(controller_on(device, known), 1, 40)[-1] != CHAINS[2]
    assert controller_on(device, known).plan(1, 100) != CHAINS[2]  # the next batch knows


def test_what_is_better_than_computed_is_found():
    """If this fails, a plan that costs less than it should is never used."""
    device = Device(slower={PLAIN: 1.0, CHAINS[0]: 1.0, CHAINS[1]: 0.4})
    controller = controller_on(device, right=0.85)
    first = device.run(controller, 8, FIRST_GAP - 2)
    assert CHAINS[1] not in first
    assert device.run(controller, 8, 40 * FIRST_GAP).count(CHAINS[1]) > 30 * FIRST_GAP


def test_steps_behind_prompts_do_not_count():
    """If this fails, reading a prompt makes a plan look slow."""
    device, known = Device(), {}
    controller = controller_on(device, known)
    for _ in range(10):
        plan = controller.plan(2, 100)
        device.now += 50.0
        controller.learn([StepRead(plan, [5], 100)] * 2, timed=False)
    assert known[2].slowness.of(kind_of(plan)) == 1.0


def test_another_number_of_texts_is_no_plans_fault():
    """If this fails, a batch that grows, or comes later, blames the plan in use for what a step takes then."""
    device, known, pauses = Device(), {4: BatchMemory()}, []
    known[4].slowness.pause = lambda: pauses.append(len(pauses))
    controller = controller_on(device, known)
    device.run(controller, 4, 5)
    device.run(controller, 3, 5)
    assert len(pauses) == 2
    device.run(controller_on(device, known), 3, 5)
    assert len(pauses) == 3


def looks_up(plan):
    return isinstance(plan, LookedUp) or (isinstance(plan, Drafted) and plan.with_lookup)


def told(texts, steps, right=0.1, lookup="auto"):
    """Plans of steps in which every text goes on as it has begun: it repeats itself, or says nothing twice."""
    device, acceptance = Device(), AcceptanceModel([right] * 7)
    device.costs.draft = {1: {2: 0.1, 8: 0.4}}
    controller = BatchController(acceptance, CHAINS, device.costs, {}, lookup, clock=lambda: device.now)
    follows, plans = [controller.follow(text) for text in texts], []
    for step in range(steps):
        plans.append(controller.plan(len(texts), 100, follows))
        device.now += device.costs.batch_seconds(plans[-1], len(texts), 100)
        new = [text[step % 3] if text[0] == text[3] else 1000 * n + step for n, text in enumerate(texts)]
        controller.learn([StepRead(plans[-1], [token], 100, follows=f) for token, f in zip(new, follows, strict=True)])
    return plans


def test_texts_that_repeat_themselves_are_looked_up():
    """If this fails, lookup takes rows in a batch where it is wrong, or none where it would be right."""
    repeating, other = [7, 8, 9] * 6, [*range(100, 118)]
    alike = told([repeating] * 2, 20)
    assert all(map(looks_up, alike[5:])) and any(isinstance(plan, LookedUp) for plan in alike)
    assert not any(map(looks_up, told([other] * 2, 20)))
    one_of_many = told([repeating, *[other] * 7], 20)
    assert max(plan.num_draft_tokens for plan in one_of_many) < max(plan.num_draft_tokens for plan in alike)
    on = told([repeating, other], 3, right=0.7, lookup="on")
    assert all(isinstance(plan, Drafted) and plan.with_lookup for plan in on)
    assert not any(map(looks_up, told([repeating] * 2, 20, lookup="off")))


@pytest.mark.parametrize("texts, expected", [(1, 1), (2, 2), (3, 4), (5, 8), (16, 16), (17, 32)])
def test_rounded(texts, expected):
    assert rounded(texts) == expected
