"""Prefix attention: a few transformer layers over the committed text, of which a head reads the last row.

Row j reads the context h_j and the embedding of the token after it, e(x_{j+1}), and attends in
every layer to the rows of a window before it (Hydra's prefix attention, arXiv 2402.05109, section
4.2; the pairing of a context with the next token is EAGLE's, arXiv 2401.15077). At the root, whose
token is known when drafting begins, what comes out is added to the projected context, once per step.
Knows nothing of trees and acceptance.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.models.llama import ModelArgs, TransformerBlock

from mlx_redrafter.drafting.drafter_files import Embedder
from mlx_redrafter.target.cache.kv_cache import KVCache
from mlx_redrafter.target.tree import CandidateTree

_HEAD_DIM = 64


class PrefixAttention(nn.Module):
    """The layers, what they read and what they give.

    Args:
        context_size, hidden_size, exit_dim: as in the drafter's config.
        window: rows that a row attends to in each layer, itself included.
        layers: how many.

    Attributes:
        reach: rows that a row's result depends on, itself included: each layer looks a window further back.
    """

    def __init__(self, context_size: int, hidden_size: int, exit_dim: int, window: int, layers: int = 1):
        super().__init__()
        heads = hidden_size // _HEAD_DIM if hidden_size % _HEAD_DIM == 0 else 1
        self.window, self.reach = window, layers * (window - 1) + 1
        args = ModelArgs("llama", hidden_size, layers, 2 * hidden_size, heads, 1e-6, 1)
        self.input_context = nn.Linear(context_size, hidden_size, bias=False)
        self.input_token = nn.Linear(hidden_size, hidden_size, bias=False)
        self.layers = [TransformerBlock(args) for _ in range(layers)]
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.output = nn.Linear(hidden_size, exit_dim, bias=False)

    def __call__(
        self, contexts: mx.array, embeddings: mx.array, cache: KVCache | None = None, at: mx.array | None = None
    ) -> mx.array:
        """What is added to the projected context.

        Args:
            contexts: (B, M, context_size) h_j of M rows in a row.
            embeddings: (B, M, hidden_size) of the token after each.
            cache: of the rows before these; gets these behind them.
            at: (B,) the one row to give; all if left out.

        Returns:
            (B, M, exit_dim), or (B, 1, exit_dim).
        """
        rows, count = self.input_context(contexts) + self.input_token(embeddings), contexts.shape[1]
        held: list[Any] = [None] * len(self.layers)
        if cache is not None:
            held = cache.layers
        else:
            behind = mx.arange(count)[:, None] - mx.arange(count)
            near = (behind >= 0) & (behind < self.window)
        for layer, before in zip(self.layers, held, strict=True):
            mask = near if before is None else before.make_mask(count)
            rows = rows + layer.self_attn(layer.input_layernorm(rows), mask, before)
            if at is not None and layer is self.layers[-1]:  # the rest of it is for the row that is read
                rows = mx.take_along_axis(rows, at[:, None, None], axis=1)
            rows = rows + layer.mlp(layer.post_attention_layernorm(rows))
        result: mx.array = self.output(self.norm(rows))
        return result


class PrefixReader:
    """Prefix attention as a memory of the text sees it (see `cached.memory.Reader`): in place of scores, what it adds.

    Args:
        prefix: the head's.
        embed: the target's embedding.
    """

    def __init__(self, prefix: PrefixAttention, embed: Embedder):
        self.prefix, self.embed = prefix, embed

    def make_cache(self) -> KVCache:
        return KVCache([RotatingKVCache(self.prefix.window) for _ in self.prefix.layers])

    def prefill(self, tokens: mx.array, contexts: mx.array | None, cache: KVCache) -> tuple[None, mx.array]:
        """Reads rows as a prompt, and gives what the last one adds, (B, 1, exit_dim)."""
        assert contexts is not None
        last = mx.full((tokens.shape[0],), tokens.shape[1] - 1, mx.int32)
        return None, self.prefix(contexts, self.embed(tokens), cache, last)

    def read(
        self, tree: CandidateTree, contexts: mx.array | None, cache: KVCache, at: mx.array | None = None
    ) -> tuple[None, mx.array]:
        """Reads rows behind what the cache holds; arguments as for `cached.head.ContextReader.read`."""
        assert contexts is not None
        with cache.reading(tree, chain=tree.in_order):
            return None, self.prefix(contexts, self.embed(tree.tokens), cache, at)
