import pytest

from mlx_redrafter.decoding.planner import StepRead
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, Plan
from mlx_redrafter.tuning.acceptance_model import AcceptanceModel
from mlx_redrafter.tuning.batch_controller import TRIAL, BatchController, rounded

CHAINS = [Drafted(DraftShape(1, n + 1, n)) for n in (1, 3, 7)]
PLANS: list[Plan] = [PLAIN, *CHAINS]


class Device:
    """Eight rows cost what one costs, more of them more; a clock that steps move on."""

    def __init__(self, slower=None, power=1.0):
        self.now, self.asked, self.slower, self.power = 0.0, [], slower or {}, power

    def __call__(self, texts):
        if texts not in self.asked:
            self.asked.append(texts)
        rows = {str(plan): texts * (1 + plan.num_draft_tokens) for plan in PLANS}
        return {plan: max(1.0, count / 8) ** self.power for plan, count in rows.items()}

    def run(self, controller, texts, steps, right=9):
        """What was drafted in each of so many steps, of which so many drafts were right at most."""
        plans = []
        for _ in range(steps):
            plan = controller.plan(texts, 100)
            self.now += self(rounded(texts))[str(plan)] * self.slower.get(plan, 1.0)
            got = min(right, plan.num_draft_tokens)
            controller.learn([StepRead(plan, [5] * (got + 1), 100) for _ in range(texts)])
            plans.append(plan)
        return plans


def controller_on(device):
    return BatchController(AcceptanceModel([0.7] * 7), CHAINS, device, clock=lambda: device.now)


def test_more_texts_get_fewer_drafts():
    """If this fails, drafts take rows that other texts would use better, or rows that cost nothing stay unused."""
    device = Device()
    controller = controller_on(device)
    chosen = [controller.plan(texts, 100).num_draft_tokens for texts in (1, 2, 4, 8, 16)]
    assert chosen == sorted(chosen, reverse=True) and chosen[0] == 7 and chosen[2] == 1 and chosen[-1] == 0
    assert device.asked == [1, 2, 4, 8, 16]
    controller.plan(5, 100)
    assert device.asked == [1, 2, 4, 8, 16]  # five cost what eight do


def test_plain_is_the_floor_and_comes_to_an_end():
    """If this fails, a batch drafts in vain, or never learns that a text has become easy."""
    device = Device(power=0.7)
    controller = controller_on(device)
    device.run(controller, 8, 200, right=0)
    plans = device.run(controller, 8, 3 * TRIAL, right=0)
    assert 1 <= sum(plan != PLAIN for plan in plans) <= 4
    assert PLAIN not in device.run(controller, 8, 20 * TRIAL, right=9)[-TRIAL:]


def test_times_of_the_steps_count():
    """If this fails, what was measured once decides, however long steps take now."""
    device = Device(slower={CHAINS[2]: 20.0})
    controller = controller_on(device)
    assert controller.plan(1, 100) == CHAINS[2]
    assert device.run(controller, 1, 40)[-1] != CHAINS[2]


@pytest.mark.parametrize("texts, expected", [(1, 1), (2, 2), (3, 4), (5, 8), (16, 16), (17, 32)])
def test_rounded(texts, expected):
    assert rounded(texts) == expected
