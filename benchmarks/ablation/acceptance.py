"""Mean acceptance length on texts that are known: drafts for all positions at once, no verification.

Where the target chooses greedily, its choice at a node of an accepted path is the text's next token, so that a step
accepts what decoding would accept. Knows nothing of how a drafter was trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_redrafter.benchmarks.ablation.texts import Text

from mlx_redrafter.decoding.sampling import draft_temperature, greedy
from mlx_redrafter.drafting.cached.eagle import EagleHead
from mlx_redrafter.drafting.kinds import Drafter, proposer_for
from mlx_redrafter.drafting.redrafter import RecurrentDrafter
from mlx_redrafter.drafting.shape import Drafted, DraftShape
from mlx_redrafter.target.cache.kv_cache import KVCache
from mlx_redrafter.target.cache.rows import keep
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.verification import accept

AT_ONCE = 64  # positions


def acceptance_on(
    target: Target, drafter: Drafter, texts: list[Text], layers: tuple[int, ...], shape: DraftShape
) -> float:
    """Tokens per step of the target over all texts.

    Args:
        layers: that the texts' contexts are of, as `Target.forward` takes them; the drafter's are among them.
    """
    produced = steps = 0
    for text in texts:
        accepted = accepted_at(target, drafter, text, layers, shape)
        at, end = 0, len(text.tokens) - text.start - 1  # the first token is the prompt's
        while at < end:
            at += int(accepted[at]) + 1
            steps += 1
        produced += max(0, end)
    return produced / max(1, steps)


def accepted_at(target: Target, drafter: Drafter, text: Text, layers: tuple[int, ...], shape: DraftShape) -> np.ndarray:
    """How many draft tokens a step accepts whose root is the target's n-th token, for all n but the last."""
    width, last = target.hidden_size, target.num_layers
    places = [list(layers or (last,)).index(layer) for layer in drafter.context_layers or (last,)]
    contexts = mx.concatenate([text.contexts[:, p * width : (p + 1) * width] for p in places], axis=-1)
    contexts = contexts.astype(target.dtype)
    proposer: Any = proposer_for(drafter, target.embed, draft_temperature(greedy))
    found, prefix = [], None
    if isinstance(drafter, RecurrentDrafter) and drafter.config.prefix_window:
        after = target.embed(mx.array(np.roll(text.tokens, -1)))
        prefix = drafter.prefix(contexts[None], after[None])[0]
    if isinstance(drafter, EagleHead):
        proposer.memory = _ReadText(drafter, contexts, text.tokens)
    ahead = np.concatenate([text.tokens, np.full(shape.num_draft_tokens + 2, -1, np.int32)])
    for first in range(text.start, len(text.tokens) - 1, AT_ONCE):
        roots = np.arange(first, min(first + AT_ONCE, len(text.tokens) - 1))
        if prefix is not None:
            proposer.memory = _Read(prefix[mx.array(roots - 1)])
        if isinstance(drafter, EagleHead):
            proposer.memory.roots = mx.array(roots)
        tree = proposer.propose(contexts[mx.array(roots - 1)], mx.array(text.tokens[roots]), Drafted(shape))
        choices = mx.array(ahead[roots[:, None] + 1 + np.array(tree.depths)])
        found.append(np.array(accept(tree, choices).count))
    return np.concatenate(found) if found else np.zeros(0, np.int32)


class _Read:
    """Stands for the `Memory` of prefix attention that has read up to many positions at once."""

    def __init__(self, rows: mx.array):
        self.rows = rows

    def last(self) -> tuple[None, mx.array]:
        return None, self.rows


class _ReadText:
    """Stands for a `Memory` of many beginnings of one text, each as far as a root.

    Attributes:
        roots: (B,) the roots' places in the text.
    """

    roots: mx.array

    def __init__(self, head: EagleHead, contexts: mx.array, tokens: np.ndarray):
        self._head, self._text = head, head.make_cache()
        self._hidden = head.rows(mx.array(np.roll(tokens, -1))[None], contexts[None], self._text)[0]

    def last(self) -> tuple[mx.array, mx.array]:
        hidden = self._hidden[self.roots - 1]
        return hidden, self._head.scores(hidden)

    @contextlib.contextmanager
    def drafting(self) -> Iterator[KVCache]:
        cache = KVCache(self._text.layers)
        cache.begin_trees()
        keep(cache, [0] * self.roots.size)
        cache.length = self.roots
        yield cache
