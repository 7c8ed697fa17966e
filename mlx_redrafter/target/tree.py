"""CandidateTree: continuations that share a prefix, folded together, with static shapes.

Rows are numbered so that a parent comes before its children; row 0 is the root.
"""

from __future__ import annotations

import dataclasses
import functools

import mlx.core as mx

from mlx_redrafter.system.ranks import Ranks


@dataclasses.dataclass
class CandidateTree:
    """1 + N rows: the root and N nodes.

    Attributes:
        tokens: (B, 1 + N) int32 token ids.
        parents: (B, 1 + N) int32 row of each row's parent; the root is its own.
        depths: (B, 1 + N) int32 distance from the root.
        ancestors: (B, 1 + N, 1 + N) bool; [b, i, j] is True where j lies on the path from
            the root to i, i included: the attention mask inside the tree.
        valid: (B, 1 + N) bool; False for rows that only fill the shape.
        max_depth: the largest depth a row can have (known to the host).
        in_order: True for a chain, row i at depth i: an accepted path needs no gathering.
    """

    tokens: mx.array
    parents: mx.array
    depths: mx.array
    ancestors: mx.array
    valid: mx.array
    max_depth: int
    in_order: bool = False

    @classmethod
    def chain(cls, tokens: mx.array, found: mx.array | None = None) -> CandidateTree:
        """A single path, of which everything but the tokens is known to the host.

        Args:
            tokens: (B, M) int32, the root first; the root alone is a plain step of decoding.
            found: (B,) bool, False where all rows but the root only fill the shape; all True if left out.
        """
        tree = cls.static(tokens, (0, *range(tokens.shape[1] - 1)))
        if found is not None:
            tree.valid = found[:, None] | (tree.depths == 0)
        return tree

    @classmethod
    def static(cls, tokens: mx.array, parents: tuple[int, ...]) -> CandidateTree:
        """A tree whose shape the host knows, so that only its tokens are computed.

        Args:
            tokens: (B, M) int32, the root first.
            parents: row of each row's parent, 0 for the root, a parent before its children.
        """
        shape, depth = _static_shape(tokens.shape[0], parents)
        return cls(tokens, *shape, max_depth=depth, in_order=parents == (0, *range(len(parents) - 1)))

    @classmethod
    def level(cls, tokens: mx.array, ancestors: mx.array, depth: int) -> CandidateTree:
        """Rows of one depth, to be read behind those of the levels above them; never accepted as they are.

        Args:
            tokens: (B, M) int32.
            ancestors: (B, M, P + M) bool, with a column for each of the P rows above.
            depth: of all rows; 0 is the position behind the committed ones.
        """
        depths = mx.full(tokens.shape, depth, mx.int32)
        return cls(tokens, depths, depths, ancestors, depths >= 0, depth)

    @classmethod
    def from_parents(
        cls, tokens: mx.array, parents: mx.array, max_depth: int, valid: mx.array | None = None
    ) -> CandidateTree:
        """Builds depths and the ancestor mask from each row's parent.

        Args:
            tokens, parents: (B, M) int32, a parent before its children.
            max_depth: no path is longer than this.
            valid: (B, M) bool, all True if left out.
        """
        rows = tokens.shape[1]
        index = mx.arange(rows, dtype=mx.int32)
        # One hop up, or staying; each squaring doubles the hops that are covered.
        reach = (index == parents[..., None]) | (index == index[:, None])
        hops = 1
        while hops < max_depth:
            floats = reach.astype(mx.float32)
            reach = (floats @ floats) > 0
            hops *= 2
        depths = mx.sum(reach.astype(mx.int32), axis=-1) - 1
        if valid is None:
            valid = mx.ones(tokens.shape, mx.bool_)
        return cls(tokens, parents, depths, reach, valid, max_depth)

    def agreed(self, ranks: Ranks) -> CandidateTree:
        """That of rank 0, and on its way: what a process of a pipeline waits for comes after it."""
        if self.in_order:
            tree = dataclasses.replace(self, tokens=ranks.agree(self.tokens))
        else:
            tokens, parents, valid = ranks.agree(mx.stack([self.tokens, self.parents, self.valid.astype(mx.int32)]))
            tree = CandidateTree.from_parents(tokens, parents, self.max_depth, valid > 0)
        mx.async_eval(tree.tokens)
        return tree

    @property
    def rows(self) -> int:
        """1 + N, the rows that one verification reads."""
        return self.tokens.shape[1]


@functools.lru_cache(maxsize=256)
def _static_shape(batch: int, parents: tuple[int, ...]) -> tuple[tuple[mx.array, mx.array, mx.array, mx.array], int]:
    """Parents, depths, ancestors and validity as constants, made once, and the largest depth."""
    paths: list[list[int]] = [[0]]
    for row, parent in enumerate(parents[1:], 1):
        paths.append([*paths[parent], row])
    rows = range(len(parents))
    depths = [len(path) - 1 for path in paths]
    ancestors = [[above in path for above in rows] for path in paths]
    above, below = mx.array([list(parents)] * batch, mx.int32), mx.array([depths] * batch, mx.int32)
    return (above, below, mx.array([ancestors] * batch), mx.array([[True for _ in rows]] * batch)), max(depths)


def ranks(keys: mx.array) -> mx.array:
    """Ranks a few values without sorting; ties go to the lower index.

    A comparison of all pairs, n^2 of them for the few dozen nodes of a tree, costs less
    than MLX's sort and is stable on every backend, which keeps parents before children.

    Args:
        keys: (B, n), larger is better.

    Returns:
        (B, n) int32, 0 for the best.
    """
    index = mx.arange(keys.shape[1], dtype=mx.int32)
    mine, other = keys[:, :, None], keys[:, None, :]
    ahead = (other > mine) | ((other == mine) & (index < index[:, None]))
    return mx.sum(ahead.astype(mx.int32), axis=-1)
