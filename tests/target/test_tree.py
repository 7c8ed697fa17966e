"""CandidateTree: depths, ancestors, and what its rows see behind committed ones."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_redrafter.target.tree import CandidateTree, tree_mask


def ancestors_by_walking(parents):
    mask = np.zeros((len(parents), len(parents)), bool)
    for i in range(len(parents)):
        node = i
        mask[i, node] = True
        while node:
            node = parents[node]
            mask[i, node] = True
    return mask


@pytest.mark.parametrize("seed", range(5))
def test_masks_and_depths(seed):
    """If this fails, a row sees a sibling's tokens, or stands at a wrong position."""
    rng = np.random.default_rng(seed)
    parents = np.array([[0] + [int(rng.integers(0, i)) for i in range(1, 13)] for _ in range(3)])
    tree = CandidateTree.from_parents(mx.zeros((3, 13), mx.int32), mx.array(parents), max_depth=12)
    for b in range(3):
        expected = ancestors_by_walking(parents[b])
        assert (np.array(tree.ancestors[b]) == expected).all()
        assert (np.array(tree.depths[b]) == expected.sum(1) - 1).all()


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 8])
def test_chain_of_exactly_the_largest_depth(depth):
    """If this fails, the squaring stops one hop short of long paths."""
    parents = mx.maximum(mx.arange(depth + 1) - 1, 0)[None]
    tree = CandidateTree.from_parents(mx.zeros((1, depth + 1), mx.int32), parents, max_depth=depth)
    assert tree.depths[0].tolist() == list(range(depth + 1))


def test_tree_mask():
    """If this fails, rows see rejected tokens, or do not see the prompt."""
    ancestors = mx.array([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]] * 2).astype(mx.bool_)
    mask = np.array(tree_mask(ancestors, mx.array([4, 2], mx.int32), 8))
    assert mask.shape == (2, 1, 3, 8)
    for b, length in enumerate((4, 2)):
        expected = np.zeros((3, 8), bool)
        expected[:, :length] = True
        expected[:, length : length + 3] = np.array(ancestors[b])
        assert (mask[b, 0] == expected).all()


@pytest.mark.parametrize("window", [None, 1, 2, 3, 7])
@pytest.mark.parametrize("start", [0, 4])
def test_tree_mask_with_a_window(window, start):
    """If this fails, a branch sees farther or less far than its depth says."""
    parents, depths, length, visible = [0, 0, 0, 1, 3], [0, 1, 1, 2, 3], 9, 16
    ancestors = np.zeros((5, 5), bool)
    for row in range(5):
        at = row
        while not ancestors[row, at]:
            ancestors[row, at] = True
            at = parents[at]
    mask = np.array(
        tree_mask(mx.array(ancestors[None]), mx.array([length]), visible, start, mx.array([depths]), window)
    )[0, 0]
    for row in range(5):
        for column in range(visible):
            position = start + column
            if position < length:
                there = True
            else:
                there = position - length < 5 and ancestors[row, position - length]
                position = length + depths[position - length] if there else position
            near = window is None or length + depths[row] - position < window
            assert mask[row, column] == (there and near), (row, column)
