"""Shapes and plans say themselves how much they draft, and refuse what no step can draft."""

import pytest

from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, LookedUp, Plain, Plan
from mlx_redrafter.errors import UserError


@pytest.mark.parametrize(
    "shape, message",
    [
        (DraftShape(0, 5, 1), "--beam-width is 0"),
        (DraftShape(98, 5, 1), "--beam-width is 98"),
        (DraftShape(4, 1, 1), "--beam-length is 1, expected 2"),
        (DraftShape(4, 33, 1), "--beam-length is 33"),
        (DraftShape(4, 5, 0), "--num-draft-tokens is 0"),
        (DraftShape(4, 5, 17), "--num-draft-tokens is 17, expected 1 to 16"),
        (DraftShape(4, 5, 1, "best"), "--tree-policy is 'best'"),
    ],
)
def test_shapes_out_of_range(shape, message):
    with pytest.raises(UserError, match=message):
        shape.check(97)


def test_the_longest_chain_in_a_tree():
    """If this fails, a target that takes chains only is given more, or less, than was asked for."""
    assert DraftShape(4, 5, 12).as_chain() == DraftShape(1, 5, 4)
    assert DraftShape(4, 5, 2, "beams").as_chain() == DraftShape(1, 3, 2, "beams")
    assert DraftShape().as_chain() == DraftShape()


def test_plans_are_told_apart():
    """If this fails, what a step drafted is shown, counted or timed as something else."""
    tree, chain = DraftShape(4, 5, 7), DraftShape()
    plans: list[Plan] = [
        PLAIN,
        Drafted(chain),
        Drafted(tree),
        Drafted(tree, with_lookup=True),
        LookedUp(3),
        LookedUp(7),
    ]
    assert len(set(plans)) == len(plans) and Plain() == PLAIN
    assert [plan.num_draft_tokens for plan in plans] == [0, 3, 7, 7, 3, 7]
    assert [str(plan) for plan in plans] == [
        "plain",
        "chain of 3",
        "tree of 7 (4 x 5)",
        "tree of 7 (4 x 5) with lookup",
        "lookup of 3",
        "lookup of 7",
    ]
    assert str(DraftShape(2, 3, 4, "beams")) == "tree of 4 (2 x 3, beams)"
