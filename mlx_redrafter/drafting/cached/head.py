"""What heads have in common that read the target's hidden states and keep keys and values of their own.

Row j reads a context, the target's hidden states at token j, and the embedding of token j + 1. Behind the last token
that the target has read, a row's own output takes the place of the context. Knows nothing of the layer between.
"""

from __future__ import annotations

import abc

import mlx.core as mx
from mlx_lm.models.cache import KVCache as PlainKVCache

from mlx_redrafter.drafting.drafter_files import DrafterBase, Embedder
from mlx_redrafter.drafting.shape import LONGEST_BEAM
from mlx_redrafter.target.cache.kv_cache import KVCache
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.tree import CandidateTree


class ContextReader(DrafterBase, abc.ABC):
    """A head as its memory sees it (see `cached.memory.Reader`); a subclass says how rows are computed and scored."""

    deepest = LONGEST_BEAM - 1
    embed: Embedder

    @abc.abstractmethod
    def fit(self, target: Target) -> None:
        """Takes what the head leaves to its target."""

    @abc.abstractmethod
    def rows(self, tokens: mx.array, contexts: mx.array | None, cache: KVCache) -> mx.array:
        """The rows' outputs (B, M, width); arguments as for `prefill`."""

    @abc.abstractmethod
    def scores(self, hidden: mx.array) -> mx.array:
        """Scores of the next token (B, M, scored) from the rows' outputs."""

    def make_cache(self) -> KVCache:
        return KVCache([PlainKVCache()])

    def prefill(self, tokens: mx.array, contexts: mx.array | None, cache: KVCache) -> tuple[mx.array, mx.array]:
        """Reads rows as a prompt; arguments as for `read`. Gives the last row's output and scores."""
        hidden = self.rows(tokens, contexts, cache)[:, -1:]
        return hidden, self.scores(hidden)

    def read(
        self, tree: CandidateTree, contexts: mx.array | None, cache: KVCache, at: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """Reads rows behind what the cache holds.

        Args:
            tree: M rows.
            contexts: (B, M, context_size) of the target, or (B, M, width) rows' outputs in their place.
            at: (B,) the one row to give; all if left out.

        Returns:
            the rows' outputs (B, M, width), and their scores of the next token (B, M, scored).
        """
        with cache.reading(tree, chain=tree.in_order):
            hidden = self.rows(tree.tokens, contexts, cache)
        if at is not None:
            hidden = mx.take_along_axis(hidden, at[:, None, None], axis=1)
        return hidden, self.scores(hidden)
