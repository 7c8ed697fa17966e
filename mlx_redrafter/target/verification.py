"""One forward pass of the target over all rows of a tree, for models that can do that."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_redrafter.target.cache.kv_cache import KVCache
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import CHAIN, NONE, TREE, Capability, probe, read
from mlx_redrafter.target.tree import CandidateTree

__all__ = ["CHAIN", "NONE", "TREE", "Verifier", "verifier_of"]


class Verifier:
    """Verifies trees with a target, as far as that target allows.

    Args:
        target: the model.
        known: what an earlier check of the same model found; checked now if left out.

    Attributes:
        capability: "tree" (any tree can be verified), "chain" (only consecutive
            positions, so beam width 1) or "none" (decode without drafts).
        reason: why the capability is not "tree", for people; empty otherwise.
        found: all that the check found.
    """

    def __init__(self, target: Target, known: Capability | None = None):
        self.found = known or probe(target)
        self.capability, self.reason = self.found.kind, self.found.reason
        self.target = Target(target.model, self.found.mixers) if self.found.mixers else target

    def make_cache(self) -> KVCache:
        """An empty cache that trees can be written to (not for capability "none")."""
        return self.adopt(make_prompt_cache(self.target.model))

    def adopt(self, prompt_cache: list[Any]) -> KVCache:
        """A cache that goes on from what mlx-lm caches hold."""
        return KVCache.adopt(prompt_cache, self.found.way)

    def __call__(self, tree: CandidateTree, cache: KVCache) -> tuple[mx.array, mx.array]:
        """Reads all rows of a tree in one call of the model.

        The rows land in the cache behind the committed ones; `KVCache.commit` keeps a path.

        Args:
            tree: 1 + N rows, the root first.
            cache: of which `begin_trees` was called.

        Returns:
            hidden (B, 1 + N, hidden_size) and logits (B, 1 + N, vocab_size).
        """
        if tree.rows == 1 and cache.settled:
            hidden, logits = self.target.forward(tree.tokens, cache.layers)
            assert hidden is not None  # capability "none" otherwise
            return hidden, logits
        return read(self.target, self.found, tree, cache)


def verifier_of(model: nn.Module) -> Verifier:
    """The verifier of an mlx-lm model, probed once per model."""
    # nn.Module keeps what is neither array nor module as a plain attribute: no parameter is
    # added. Only the outcome is kept, or the model would own itself in a circle.
    verifier = Verifier(Target(model), getattr(model, "_redrafter_capability", None))
    model._redrafter_capability = verifier.found
    return verifier
