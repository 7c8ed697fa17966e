"""Proposes with drafters that remember the text: in a cache of their own, or in that of their prefix attention.

Knows nothing of how a drafter computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_redrafter.drafting.beam_search import candidate_tree, grow
from mlx_redrafter.drafting.cached.draft_model import DraftModel
from mlx_redrafter.drafting.cached.head import ContextReader
from mlx_redrafter.drafting.cached.memory import Memory, Reader
from mlx_redrafter.drafting.drafter_files import DrafterBase, Embedder
from mlx_redrafter.drafting.prefix_attention import PrefixReader
from mlx_redrafter.drafting.proposers import LEFT, Proposer, RecurrentProposer
from mlx_redrafter.drafting.redrafter import RecurrentDrafter
from mlx_redrafter.drafting.shape import Drafted, Plan
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import Accepted

WINDOW = 4096  # tokens of a prompt whose contexts are read: heads are trained on texts about so long


class RememberingProposer(Proposer):
    """Keeps a memory of the text up to date, which a subclass drafts from.

    Args:
        drafter: the drafter, one object in all turns of a conversation.
        reader: of its rows.
        text: all tokens before the first step, where they are known, of a text that another one began; for
            drafters that read tokens alone.

    Attributes:
        memory: what was read.
    """

    def __init__(self, drafter: DrafterBase | DraftModel, reader: Reader, text: Sequence[int] = ()):
        self._owner, self._reader, self._text = drafter, reader, text
        self.context_layers, self._reads_contexts = drafter.context_layers, not isinstance(drafter, DraftModel)
        self.memory = Memory(reader)
        self._rows = self._held = 0  # read of the text before, and its length
        self._before: mx.array | None = None  # the context of its last token
        self._unread = 0  # tokens of the text that have no row
        self._root_is_known = True

    def begin(self, text: mx.array, root: mx.array, contexts: mx.array) -> None:
        if not self._rows:  # nothing was left to go on from
            self.memory = Memory(self._reader)
        after = mx.concatenate([text, root[:, None].astype(text.dtype)], axis=1)
        found: mx.array | None = None
        if self._reads_contexts:
            whole = contexts.shape[1] == text.shape[1]
            if self._rows and self._before is not None and whole:
                contexts = mx.concatenate([self._before, contexts], axis=1)
            elif self._rows:  # there is a gap
                self.memory, self._rows = Memory(self._reader), 0
            after, found = after[:, -contexts.shape[1] :], contexts
        elif not self._rows and text.shape[0] == 1:
            earlier = list(self._text[: len(self._text) - text.shape[1]])
            after = mx.concatenate([mx.array([earlier], after.dtype), after], axis=1) if earlier else after
        self.memory.begin(after, found)
        self._unread = self._held + text.shape[1] + 1 - (self._rows + after.shape[1])
        self._root_is_known = False

    def advance(self, accepted: Accepted, contexts: mx.array) -> None:
        found: mx.array | None = None
        plain = accepted.path.shape[1] == 1
        if self._reads_contexts:
            found = contexts if plain else mx.take_along_axis(contexts, accepted.path[..., None], axis=1)
        self.memory.extend(accepted.tokens, found, None if plain else accepted.count + 1)

    def learn(self, tokens: list[int]) -> None:
        if self._root_is_known:
            self.memory.learn(len(tokens))
        self._root_is_known = True

    def leave(self, cache: Any, tokens: int, dropped: int, context: mx.array) -> None:
        rows = tokens - self._unread
        if self.memory.cut(rows):
            LEFT[cache] = self.memory, tokens, context, rows, self._owner

    def resume(self, cache: Any, tokens: int) -> None:
        memory, known, context, rows, owner = LEFT.pop(cache, (None, 0, None, 0, None))
        self._held = tokens
        if owner is self._owner and known == tokens:
            self.memory, self._rows, self._before = memory, rows, context

    def tighten(self, longest: int) -> None:
        self.memory.tighten(longest)

    def join(self, other: Proposer) -> None:
        assert isinstance(other, RememberingProposer)
        self.memory.join(other.memory)

    def keep(self, texts: list[int]) -> None:
        self.memory.keep(texts)

    def arrays(self) -> list[mx.array]:
        return self.memory.arrays()


class CachedProposer(RememberingProposer):
    """Beam search over a drafter with a cache of its own, level by level.

    Args:
        drafter: the drafter.
        temperature: of its probabilities, by which nodes are chosen.
        text: as for `RememberingProposer`.
    """

    def __init__(self, drafter: DraftModel | ContextReader, temperature: float = 1.0, text: Sequence[int] = ()):
        super().__init__(drafter, drafter, text)
        self.drafter, self.temperature = drafter, temperature
        if self._reads_contexts:
            self.prefix_window = WINDOW

    def propose(self, context: mx.array, root: mx.array, plan: Plan, chain_only: bool = False) -> CandidateTree:
        assert isinstance(plan, Drafted)
        shape, width, length, drafter = plan.shape, plan.shape.beam_width, plan.shape.beam_length, self.drafter
        if chain_only or min(width, drafter.widest) == 1:
            width, length = 1, min(length, shape.num_draft_tokens + 1)
        hidden, scores = self.memory.last()
        batch, level = root.shape[0], 0
        alone = mx.broadcast_to(mx.eye(width, dtype=mx.bool_), (batch, width, width))
        ancestors = alone[:, :, :0]
        with self.memory.drafting() as cache:

            def follow(tokens: mx.array, origins: mx.array) -> mx.array:
                nonlocal hidden, ancestors, level
                above = mx.take_along_axis(ancestors, origins[..., None], axis=1) if level else ancestors
                ancestors = mx.concatenate([above, alone], axis=2)
                features = None
                if hidden is not None:
                    entries = hidden.reshape(batch, -1, hidden.shape[-1])
                    features = mx.take_along_axis(entries, origins[..., None], axis=1)
                hidden, scores = drafter.read(CandidateTree.level(tokens, ancestors, level), features, cache)
                level += 1
                return scores.reshape(batch * width, -1)

            beam = grow(scores, follow, drafter.get("vocab_map"), batch, width, length, self.temperature)
        if width == 1:
            return CandidateTree.chain(mx.concatenate([root[:, None].astype(mx.int32), beam.tokens[:, :, 0]], axis=1))
        return candidate_tree(beam, root, shape.num_draft_tokens, shape.tree_policy)


class PrefixProposer(RememberingProposer, RecurrentProposer):
    """Beam search over a recurrent drafter with prefix attention; arguments as for `RecurrentProposer`."""

    def __init__(self, drafter: RecurrentDrafter, embed: Embedder, temperature: float = 1.0):
        RecurrentProposer.__init__(self, drafter, embed, temperature)
        RememberingProposer.__init__(self, drafter, PrefixReader(drafter.prefix, embed))
        self.prefix_window = drafter.prefix.reach

    def project(self, context: mx.array) -> mx.array:
        _, added = self.memory.last()
        return super().project(context) + added
