"""Which path of a tree the target agrees with."""

from __future__ import annotations

import dataclasses

import mlx.core as mx

from mlx_redrafter.target.tree import CandidateTree


@dataclasses.dataclass
class Accepted:
    """The deepest path all of whose tokens are the target's own choices.

    Attributes:
        count: (B,) int32 accepted draft tokens, 0 or more.
        path: (B, D + 1) int32 rows of the path, the root first, D the tree's largest depth.
            Rows beyond `count` lie in the tree and do not count.
        tokens: (B, D + 1) int32 what this step produces: the target's choice at each row of
            the path. The first count + 1 count; the last of those is the next root.
        root: (B,) int32 the target's choice at the path's end.
        last: (B,) int32 row at the path's end, whose hidden state is the next context.
    """

    count: mx.array
    path: mx.array
    tokens: mx.array
    root: mx.array
    last: mx.array


def accept(tree: CandidateTree, choices: mx.array) -> Accepted:
    """Follows the target's choices through a tree.

    A node is accepted when every token on its path equals the choice made at its parent
    (paper, section 3.3, with equality in place of a ratio test). The candidates do not
    depend on how the target chooses, so this is exact for any way of choosing.

    Args:
        tree: the candidates.
        choices: (B, 1 + N) int32 the target's token at every row.
    """
    if tree.in_order:  # as many tokens as agree from the first one on
        path = tree.depths  # row i at depth i
        if path.shape[1] == 1:
            return Accepted(tree.parents[:, 0], path, choices, choices[:, 0], path[:, 0])
        agrees = (tree.tokens[:, 1:] == choices[:, :-1]) & tree.valid[:, 1:]
        count = mx.sum(mx.cumprod(agrees.astype(mx.int32), axis=1), axis=1)
        root = mx.take_along_axis(choices, count[:, None], axis=1)[:, 0]
        return Accepted(count, path, choices, root, count)
    agrees = (tree.tokens == mx.take_along_axis(choices, tree.parents, axis=1)) & tree.valid
    # The root was chosen by the target in the step before.
    doubtful = mx.concatenate([mx.zeros((agrees.shape[0], 1), mx.bool_), ~agrees[:, 1:]], axis=1)
    rejected = mx.any(tree.ancestors & doubtful[:, None, :], axis=-1)
    depth = mx.where(rejected, -1, tree.depths)
    last = mx.argmax(depth, axis=1).astype(mx.int32)
    count = mx.max(depth, axis=1)
    on_path = mx.take_along_axis(tree.ancestors, last[:, None, None], axis=1)
    levels = mx.minimum(mx.arange(tree.max_depth + 1, dtype=mx.int32), count[:, None])
    at_level = on_path & (tree.depths[:, None, :] == levels[..., None])
    path = mx.argmax(at_level, axis=-1).astype(mx.int32)
    tokens = mx.take_along_axis(choices, path, axis=1)
    root = mx.take_along_axis(choices, last[:, None], axis=1)[:, 0]
    return Accepted(count, path, tokens, root, last)
