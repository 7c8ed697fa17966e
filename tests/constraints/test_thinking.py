"""A thought ends when it has had its tokens, wherever it began, and other text is left alone."""

import mlx.core as mx
import pytest

from mlx_redrafter.constraints.thinking import thinking_budget

START, END, OTHER = [1, 2], [3, 4], 7


def forced(tokens, most, start=START, end=END):
    """The one token that may come next; None where all may."""
    found = thinking_budget(start, end, most)(mx.array(tokens), mx.zeros((1, 9)))
    [allowed] = [[i for i, value in enumerate(row) if value == 0] for row in found.tolist()]
    assert len(allowed) in (1, 9)
    return allowed[0] if len(allowed) == 1 else None


@pytest.mark.parametrize("before", [[], [OTHER] * 20, [*START, OTHER, *END, OTHER]])
@pytest.mark.parametrize("most", [0, 1, 3])
def test_a_thought_ends(before, most):
    """If this fails, a model thinks longer than it may, or is cut off earlier."""
    text = [*before, *START]
    for _ in range(most):
        assert forced(text, most) is None
        text.append(OTHER)
    for token in END:
        assert forced(text, most) == token
        text.append(token)
    assert forced(text, most) is None and forced([*text, *[OTHER] * 9], most) is None
    assert forced([*text, *START, *[OTHER] * most], most) == END[0]


def test_text_without_thoughts_is_left_alone():
    for text in ([OTHER], [1], [2, 1], [*START, *END], [OTHER, 1, OTHER, 2, OTHER, OTHER], END):
        assert forced(text, 1) is None
    assert forced([5], 0, [5], [6]) == 6 and forced([5, 6], 0, [5], [6]) is None


def test_a_thought_that_ends_itself():
    assert forced([*START, OTHER, 3], 2) == 3 and forced([*START, OTHER, 3], 3) is None
    assert forced([*START, OTHER, *END, OTHER, OTHER], 2) is None
