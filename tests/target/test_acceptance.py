"""Acceptance on trees small enough to follow by hand."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_redrafter.target.acceptance import accept
from mlx_redrafter.target.tree import CandidateTree

#        root 9
#       /  |   \
#      1   2    3        rows 1, 2, 3
#     / \   \
#    4   5   4           rows 4, 5, 6
#    |
#    7                   row 7
PARENTS = [0, 0, 0, 0, 1, 1, 2, 4]
TOKENS = [9, 1, 2, 3, 4, 5, 4, 7]


def tree(valid=None):
    if valid is not None:
        valid = mx.array([valid])
    return CandidateTree.from_parents(mx.array([TOKENS]), mx.array([PARENTS]), 3, valid)


@pytest.mark.parametrize(
    "choices, count, path, tokens",
    [
        ([8, 0, 0, 0, 0, 0, 0, 0], 0, [0], [8]),  # nothing drafted was right
        ([3, 0, 0, 6, 0, 0, 0, 0], 1, [0, 3], [3, 6]),
        ([1, 5, 0, 0, 0, 2, 0, 0], 2, [0, 1, 5], [1, 5, 2]),
        ([1, 4, 0, 0, 7, 0, 0, 8], 3, [0, 1, 4, 7], [1, 4, 7, 8]),
        # Row 6 agrees with its parent's choice, but the path to it was not taken.
        ([1, 0, 4, 0, 0, 0, 0, 0], 1, [0, 1], [1, 0]),
        # The root is never checked, whatever the target chose at row 0.
        ([9, 0, 0, 0, 0, 0, 0, 0], 0, [0], [9]),
    ],
)
def test_follows_the_target(choices, count, path, tokens):
    """If this fails, text is written that the target would not have written."""
    accepted = accept(tree(), mx.array([choices], mx.int32))
    assert accepted.count.item() == count
    assert accepted.path[0].tolist()[: count + 1] == path
    assert accepted.tokens[0].tolist()[: count + 1] == tokens
    assert accepted.root.item() == tokens[-1] and accepted.last.item() == path[-1]
    assert accepted.path.shape == (1, 4)


def test_rows_that_only_fill_the_shape_are_never_accepted():
    valid = [True] * 4 + [False] * 4
    accepted = accept(tree(valid), mx.array([[1, 4, 0, 0, 7, 0, 0, 8]], mx.int32))
    assert accepted.count.item() == 1 and accepted.root.item() == 4
    chain = CandidateTree.chain(mx.array([[9, 1, 2]] * 2), mx.array([True, False]))
    accepted = accept(chain, mx.array([[1, 2, 3]] * 2, mx.int32))
    assert accepted.count.tolist() == [2, 0] and accepted.root.tolist() == [3, 1]


@pytest.mark.parametrize("drafted", [[1, 2, 3], [1, 2, 4], [1, 4, 3], [4, 2, 3]])
def test_a_chain_is_accepted_like_the_same_tree(drafted):
    """If this fails, the short way for chains accepts other tokens than the long one for trees."""
    choices, tokens = mx.array([[1, 2, 3, 8]], mx.int32), mx.array([[9, *drafted]], mx.int32)
    chain = CandidateTree.chain(tokens)
    tree = CandidateTree.from_parents(tokens, mx.array([[0, 0, 1, 2]]), 3)
    for field in ("parents", "depths", "ancestors", "valid", "max_depth"):
        assert mx.array_equal(mx.array(getattr(chain, field)), mx.array(getattr(tree, field)))
    short, long = accept(chain, choices), accept(tree, choices)
    assert short.count.item() == [d == c for d, c in zip([*drafted, -1], [1, 2, 3, 8])].index(False)
    count = 1 + short.count.item()
    for field in ("count", "root", "last"):
        assert getattr(short, field).item() == getattr(long, field).item()
    assert short.path[0, :count].tolist() == long.path[0, :count].tolist()
    assert short.tokens[0, :count].tolist() == long.tokens[0, :count].tolist()


def test_random_trees_against_a_walk():
    """If this fails, the masks and gathers disagree with walking the tree from the root."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        parents = [0] + [int(rng.integers(0, i)) for i in range(1, 12)]
        children: dict[int, list[int]] = {}
        tokens = [0] * 12
        for i in range(1, 12):  # siblings differ, as in any merged tree
            tokens[i] = len(children.setdefault(parents[i], []))
            children[parents[i]].append(i)
        choices = rng.integers(0, 3, 12).tolist()
        node, expected = 0, []
        while True:
            expected.append(choices[node])
            following = [c for c in children.get(node, []) if tokens[c] == choices[node]]
            if not following:
                break
            node = following[0]
        one = CandidateTree.from_parents(mx.array([tokens]), mx.array([parents]), 11)
        accepted = accept(one, mx.array([choices], mx.int32))
        assert accepted.tokens[0].tolist()[: accepted.count.item() + 1] == expected
