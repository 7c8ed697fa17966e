"""CandidateTree and the ranking it is chosen with."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_redrafter.target.tree import CandidateTree, ranks


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


def test_ranks_are_stable():
    """If this fails, a child of probability 1 can be kept without its parent."""
    keys = mx.array([[1.0, 3.0, 3.0, -1e30, 3.0, 2.0]])
    assert ranks(keys)[0].tolist() == [4, 0, 1, 5, 2, 3]
