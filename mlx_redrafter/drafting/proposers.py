"""Who proposes: whatever yields a CandidateTree can be verified.

Knows nothing of verification. A proposer is asked once per step that drafts, while the
step's graph is built, and reads nothing on the host. What it is asked for may change
between any two steps; everything that depends on it (rows, depth, whether rows lie in
order) travels with the tree.
"""

from __future__ import annotations

import weakref
from typing import Any

import mlx.core as mx

from mlx_redrafter.drafting.beam_search import beam_search, candidate_tree, top
from mlx_redrafter.drafting.drafter_files import Embedder
from mlx_redrafter.drafting.medusa import MedusaHeads
from mlx_redrafter.drafting.medusa_tree import parents_of, select
from mlx_redrafter.drafting.redrafter import RecurrentDrafter
from mlx_redrafter.drafting.shape import Drafted, Plan
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import Accepted


class Proposer:
    """Proposes continuations of the text so far; this one nothing, for steps that nobody drafts for.

    Attributes:
        context_layers: the target's layers whose hidden states are the context, as `Target.forward` takes them.
        prefix_window: committed tokens before the first step whose contexts it reads, if they are there; 0 where
            it reads none.
        from_any_root: it can propose behind a token further on than the root, by the context that there is.
        projected: (B, exit_dim) what the head made of the context of the last step, for a recurrent head.
    """

    context_layers: tuple[int, ...] = ()
    prefix_window = 0
    from_any_root = False
    projected: mx.array | None = None

    def propose(self, context: mx.array, root: mx.array, plan: Plan, chain_only: bool = False) -> CandidateTree:
        """The candidates for one step, as a lazy graph.

        Args:
            context: (B, context_size) the target's hidden states at the last committed token.
            root: (B,) int32 the token that the target has chosen and not yet read.
            plan: what to draft; not `Plain`.
            chain_only: the target can verify only consecutive positions.

        Returns:
            A tree whose row 0 is the root.
        """
        return CandidateTree.chain(root[:, None].astype(mx.int32))

    def begin(self, text: mx.array, root: mx.array, contexts: mx.array) -> None:
        """Called before the first step.

        Args:
            text: (B, n) int32 the prompt.
            root: (B,) int32 the token after it; still on the device.
            contexts: (B, m, context_size) of the last m tokens of the prompt.
        """

    def advance(self, accepted: Accepted, contexts: mx.array) -> None:
        """Called with what a step accepts as soon as its graph is built, before the next step.

        Args:
            accepted: the path and its tokens.
            contexts: (B, 1 + N, context_size) of all rows of the step's tree.
        """

    def leave(self, cache: Any, tokens: int, dropped: int, context: mx.array) -> None:
        """Called when a text is left that others may go on from (batch size 1).

        Args:
            cache: what the text is kept in; no longer needed than this object is there.
            tokens: of the text.
            dropped: rows that were committed, and are not part of it.
            context: (1, 1, context_size) of its last token.
        """

    def resume(self, cache: Any, tokens: int) -> None:
        """Called before `begin` where a text goes on that was left; arguments as for `leave`."""

    def learn(self, tokens: list[int]) -> None:
        """Called once the host has read a step (batch size 1): first the root after the prompt, then each step."""

    def tighten(self, longest: int) -> None:
        """Is told that no text is longer than so many tokens, those of a step on its way included (any batch size)."""

    def join(self, other: Proposer) -> None:
        """Takes the texts of another proposer of the same drafter behind those of this one."""

    def keep(self, texts: list[int]) -> None:
        """Keeps these texts of the batch, in this order."""

    def arrays(self) -> list[mx.array]:
        """State on the device that goes from step to step."""
        return []


# By the first layer of the prompt cache that holds a text: what a drafter has read of it, how long it is, the context
# of its end, and what else that drafter notes.
LEFT: weakref.WeakKeyDictionary[Any, tuple[Any, ...]] = weakref.WeakKeyDictionary()


def forget(cache: Any) -> None:
    """Drops what was left for a text that goes on, by the first layer of its prompt cache."""
    LEFT.pop(cache, None)


class RecurrentProposer(Proposer):
    """Beam search over the recurrent drafter.

    Args:
        drafter: the head; one with prefix attention has a proposer of its own, `cached.proposer.PrefixProposer`.
        embed: the target's embedding.
        temperature: of the drafter's probabilities, by which nodes are chosen.
    """

    prefix_window, from_any_root = 1, True

    def __init__(self, drafter: RecurrentDrafter, embed: Embedder, temperature: float = 1.0):
        self.drafter, self.embed, self.temperature = drafter, embed, temperature
        self.context_layers = drafter.context_layers

    def propose(self, context: mx.array, root: mx.array, plan: Plan, chain_only: bool = False) -> CandidateTree:
        assert isinstance(plan, Drafted)
        shape, width, length = plan.shape, plan.shape.beam_width, plan.shape.beam_length
        if chain_only or width == 1:
            width, length = 1, min(length, shape.num_draft_tokens + 1)
        self.projected = projected = self.project(context)
        beam = beam_search(self.drafter, self.embed, projected, root, width, length, self.temperature)
        if width == 1:
            return CandidateTree.chain(mx.concatenate([root[:, None].astype(mx.int32), beam.tokens[:, :, 0]], axis=1))
        return candidate_tree(beam, root, shape.num_draft_tokens, shape.tree_policy)

    def project(self, context: mx.array) -> mx.array:
        """What the head makes of the context (B, context_size): (B, exit_dim)."""
        return self.drafter.project_context(context)


class MedusaProposer(Proposer):
    """Medusa heads, combined along a static tree.

    Of the heads' choices a shape takes the first N that lie among the best W of each of the
    first L - 1 heads; with W = 1 that is a chain.
    """

    prefix_window = 1

    def __init__(self, heads: MedusaHeads):
        self.heads = heads

    def propose(self, context: mx.array, root: mx.array, plan: Plan, chain_only: bool = False) -> CandidateTree:
        assert isinstance(plan, Drafted)
        shape, config, batch = plan.shape, self.heads.config, root.shape[0]
        first = root[:, None].astype(mx.int32)
        if chain_only or shape.beam_width == 1:
            depth = min(shape.as_chain().beam_length - 1, config.medusa_num_heads)
            choices = tuple((0,) * n for n in range(1, depth + 1))
        else:
            width = min(shape.beam_width, config.vocab_size)
            choices = select(config.medusa_choices, width, shape.beam_length - 1, shape.num_draft_tokens)
        depth, width = max(map(len, choices), default=0), 1 + max(map(max, choices), default=0)
        if depth == 0:  # choices that begin with none of these
            return CandidateTree.chain(first)
        logits = self.heads(context, depth).astype(mx.float32)
        best, _ = top(logits.reshape(batch * depth, -1), width)
        places = mx.array([(len(choice) - 1) * width + choice[-1] for choice in choices])
        tokens = mx.take(best.reshape(batch, depth * width), places, axis=1)
        return CandidateTree.static(mx.concatenate([first, tokens], axis=1), parents_of(choices))
