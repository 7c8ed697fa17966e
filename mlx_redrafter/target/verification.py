"""Reads all rows of a tree in one forward pass of the target, and says which path of it the target agrees with.

Knows nothing of drafters, nor of how it was found out what a target can do (see `probe`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.module_slots import slots, standing_in
from mlx_redrafter.target.cache.attention import submit_part
from mlx_redrafter.target.cache.kv_cache import KVCache
from mlx_redrafter.target.cache.recurrent import AT_ONCE
from mlx_redrafter.target.cache.replay import MixerStandIn
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.tree import CandidateTree

TREE, CHAIN, NONE = "tree", "chain", "none"


@dataclasses.dataclass(frozen=True)
class Capability:
    """What can be verified with a model, and how.

    Attributes:
        kind: TREE (any tree), CHAIN (consecutive positions only, so beam width 1) or NONE
            (decode without drafts).
        reason: why it is not TREE, or what a tree costs more than usual, for people; else empty.
        split_rows: the model gets each row of a tree as a batch entry of its own, so keys and
            values are read once per row.
        replay: how layers with a recurrent state take rows back: AT_ONCE or ROW_BY_ROW, see `cache.recurrent`.
        mixers: paths of the modules that read and write such a state.
    """

    kind: str
    reason: str = ""
    split_rows: bool = False
    replay: str = AT_ONCE
    mixers: tuple[str, ...] = ()


class Verifier:
    """Verifies trees with a target, as far as that target can.

    Args:
        target: the model.
        found: what it can do, as `probe` found out.

    Attributes:
        capability, reason: the kind and the reason of `found`.
    """

    def __init__(self, target: Target, found: Capability):
        self.target, self.found = target, found
        self.capability, self.reason = found.kind, found.reason
        there = slots(target.model) if found.mixers else ()
        self._mixers = [(slot, MixerStandIn(slot.module)) for slot in there if slot.path in found.mixers]

    def checked(self, where: str = "this target") -> Verifier:
        """Itself. Raises UserError for a target that can verify nothing."""
        if self.capability == NONE:
            raise UserError(f"{where} cannot verify drafts: {self.reason}")
        return self

    def make_cache(self, prompt_cache: list[Any] | None = None) -> KVCache:
        """A cache that trees can be written to (not for capability "none"); goes on from what mlx-lm caches hold."""
        caches = make_prompt_cache(self.target.model) if prompt_cache is None else prompt_cache
        return KVCache(caches, self.found.replay)

    def __call__(
        self, tree: CandidateTree, cache: KVCache, context_layers: tuple[int, ...] = ()
    ) -> tuple[mx.array, mx.array]:
        """Reads all rows of a tree in one call of the model.

        The rows land in the cache behind the committed ones; `KVCache.commit` keeps a path.

        Args:
            tree: 1 + N rows, the root first.
            cache: of which `begin_trees` was called.
            context_layers: which hidden states to give; see `Target.forward`.

        Returns:
            hidden (B, 1 + N, context_size) and logits (B, 1 + N, vocab_size).
        """
        submit_part(tree.tokens, tree.ancestors)
        split = self.found.split_rows
        tokens = tree.tokens.reshape(-1, 1) if split else tree.tokens
        with cache.reading(tree, self.found.kind == CHAIN, split), standing_in(self._mixers):
            hidden, logits = self.target.forward(tokens, cache.layers, context_layers)
        assert hidden is not None  # the kind is NONE otherwise
        if split:
            hidden, logits = (x.reshape(*tree.tokens.shape, x.shape[-1]) for x in (hidden, logits))
        return hidden, logits


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
