"""CandidateTree: continuations that share a prefix, folded together; and where its rows go, stand and what they see.

Knows nothing of caches, nor of models. Shapes are static. Rows are numbered so that a parent
comes before its children; row 0 is the root.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

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


@dataclasses.dataclass
class TreeFrame:
    """One verification, as every layer has to see it.

    Attributes:
        length: committed rows, (B,) int32, on the device.
        depths: (B, M) int32 distance of each row from the root.
        ancestors: (B, M, P + M) bool; [b, i, j] is True where row i may look at row j. The tree's first P rows
            were read before, in pieces, and lie behind the committed ones.
        chain: rows stand in consecutive positions, and the model is told only the first.
        bound: no length is above it.
        low: no length is below it, nor will it be after rows were taken back.
        split_rows: the model gets each row as a batch entry of its own, (B * M, 1), for it knows
            positions per entry only.
        replaying: recurrent layers are being brought to where the accepted rows end.
        offset: what the model hands to its rope: (B, M) positions, (B,) the first ones, or (B * M,).
        rows, before: M and P.
        places: where the rows are written.
        every_row: (B, M), all True: the mask that recurrent layers are given.
    """

    length: mx.array
    depths: mx.array
    ancestors: mx.array
    chain: bool
    bound: int
    low: int
    split_rows: bool = False
    replaying: bool = False

    def __post_init__(self) -> None:
        self.rows = self.depths.shape[1]
        self.before = self.ancestors.shape[2] - self.rows
        first = self.length + self.before if self.before else self.length
        self.offset = first if self.chain else self.length[:, None] + self.depths
        if self.split_rows:
            self.offset = self.offset.reshape(-1)
        self.places = Places(first)
        self.every_row = mx.ones(self.depths.shape, mx.bool_)
        self._masks: dict[tuple[int, int, int | None], mx.array] = {}

    def mask(self, start: int, visible: int, window: int | None) -> mx.array:
        """(B, 1, M, visible) bool, or (B * M, 1, 1, visible); columns begin at position `start`; made only once."""
        key = (start, visible, window)
        if key not in self._masks:
            mask = tree_mask(self.ancestors, self.length, visible, start, self.depths, window)
            self._masks[key] = mask.reshape(-1, 1, 1, visible) if self.split_rows else mask
        return self._masks[key]

    def is_mask(self, value: Any) -> bool:
        """Whether this is one of the masks that `mask` returned."""
        return any(value is mask for mask in self._masks.values())

    def joined(self, rows: mx.array) -> mx.array:
        """(B, heads, M, width) of what the model made of split rows, (B * M, heads, 1, width)."""
        batch, heads, width = self.length.shape[0], rows.shape[1], rows.shape[3]
        return rows.reshape(batch, self.rows, heads, width).swapaxes(1, 2)

    def for_split_rows(self, buffer: mx.array) -> mx.array:
        """A buffer (B, ...) as each of the B * M split rows reads it."""
        if buffer.shape[0] == 1:
            return mx.broadcast_to(buffer, (self.rows, *buffer.shape[1:]))
        return mx.repeat(buffer, self.rows, axis=0)


def tree_mask(
    ancestors: mx.array,
    length: mx.array,
    visible: int,
    start: int = 0,
    depths: mx.array | None = None,
    window: int | None = None,
) -> mx.array:
    """What each row of a tree may look at: committed rows, its ancestors, itself, as far as a window reaches.

    Args:
        ancestors: (B, M, P + M) bool, every row's own column True.
        length: (B,) committed rows; the tree's rows follow them.
        visible: columns of the mask; start + visible is at least length + P + M.
        start: position of the first column.
        depths: (B, M) distance from the root; needed where there is a window.
        window: a row at position p sees positions above p - window; None for all.

    Returns:
        (B, 1, M, visible) bool.
    """
    batch, rows, _ = ancestors.shape
    columns = mx.arange(start, start + visible, dtype=mx.int32)
    committed = (columns < length[:, None])[:, None, None, :]
    if window is None:
        mask = mx.broadcast_to(committed, (batch, 1, rows, visible))
    else:
        assert depths is not None
        first = length[:, None] + depths - (window - 1)
        mask = committed & (columns >= first[:, None, :, None])
        if ancestors.shape[2] == rows:  # pieces are drafts of a few levels, which no window is shorter than
            ancestors = ancestors & (depths[:, :, None] - depths[:, None, :] < window)
    return Places(length - start).write(mask, ancestors[:, None], axis=3)


@dataclasses.dataclass
class Places:
    """Where rows go, from position (B,) on. What is computed for that is computed once for all layers."""

    position: mx.array
    _starts: dict[int, mx.array] = dataclasses.field(default_factory=dict)  # by the position of a buffer's first row
    _indices: dict[tuple[int, ...], mx.array] = dataclasses.field(default_factory=dict)

    def write(self, buffer: mx.array, rows: mx.array, base: int = 0, axis: int = 2) -> mx.array:
        """A buffer with rows written along an axis.

        Args:
            buffer, rows: the batch first; equal shapes but for the axis.
            base: position of the buffer's first row.
        """
        if base not in self._starts:
            self._starts[base] = self.position - base if base else self.position
        start, key = self._starts[base], (base, axis, *rows.shape)
        if buffer.shape[0] == 1:
            return mx.slice_update(buffer, rows, start, axes=(axis,))
        if key not in self._indices:
            places = start[:, None] + mx.arange(rows.shape[axis], dtype=start.dtype)
            others = [a for a in range(1, rows.ndim) if a != axis]
            self._indices[key] = mx.broadcast_to(mx.expand_dims(places, others), rows.shape)
        return mx.put_along_axis(buffer, self._indices[key], rows, axis=axis)
