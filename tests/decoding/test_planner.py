"""The planner that never changes its mind, and what it is told."""

from mlx_redrafter.decoding.planner import Planner, StepRead
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape


def test_always_the_same():
    """If this fails, a shape that was asked for is not kept to."""
    for plan in (PLAIN, Drafted(DraftShape(4, 5, 7), with_lookup=True)):
        planner = Planner(plan)
        for tokens in ([1], [1, 2, 3]):
            assert planner.plan() == plan == planner.plan()
            planner.learn(StepRead(plan, tokens, 20))
