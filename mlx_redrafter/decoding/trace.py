"""Decoding that can be watched: what each step drafted, how sure the drafter was, what was accepted."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Generator, Sequence
from typing import Any

import mlx.core as mx

from mlx_redrafter.decoding.loop import speculative, wait_for
from mlx_redrafter.decoding.planner import Planner
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.drafter_files import Embedder
from mlx_redrafter.drafting.proposers import Proposer
from mlx_redrafter.drafting.redrafter import RecurrentDrafter
from mlx_redrafter.drafting.shape import LookedUp, Plain, Plan
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import Accepted, Verifier


@dataclasses.dataclass
class Node:
    """One candidate token.

    Attributes:
        token: its id.
        parent: index of the node it follows; the root is node 0, and its own.
        depth: distance from the root.
        accepted: whether the target chose it; the root is always accepted.
        probability: the drafter's, given what comes before; None where the drafter says none.
    """

    token: int
    parent: int
    depth: int
    accepted: bool
    probability: float | None


@dataclasses.dataclass
class WatchedStep:
    """One step.

    Attributes:
        nodes: the root and all candidates, parents before children.
        tokens: what the step produced: the accepted candidates, and the target's own choice after them.
        by_lookup: the candidates are lookup's alone.
    """

    nodes: list[Node]
    tokens: list[int]
    by_lookup: bool = False


class Watched(Proposer):
    """Another proposer, whose candidates and what became of them are kept until they are taken.

    Attributes:
        steps: of each step in order what the head read (1, exit_dim), if a head drafted, tree and acceptance;
            still on the device.
    """

    def __init__(self, inner: Proposer):
        self.inner = inner
        self.context_layers, self.prefix_window = inner.context_layers, inner.prefix_window
        self.steps: deque[tuple[mx.array | None, CandidateTree, Accepted]] = deque()
        self._asked: tuple[mx.array | None, CandidateTree] | None = None

    def propose(self, context: mx.array, root: mx.array, plan: Plan, chain_only: bool = False) -> CandidateTree:
        tree = self.inner.propose(context, root, plan, chain_only)
        self._asked = self.inner.projected, tree
        return tree

    def begin(self, text: mx.array, root: mx.array, contexts: mx.array) -> None:
        self.steps.clear()
        self.inner.begin(text, root, contexts)

    def advance(self, accepted: Accepted, contexts: mx.array) -> None:
        if self._asked is not None:  # a plain step asks for nothing
            self.steps.append((*self._asked, accepted))
        self._asked = None
        self.inner.advance(accepted, contexts)

    def learn(self, tokens: list[int]) -> None:
        self.inner.learn(tokens)

    def arrays(self) -> list[mx.array]:
        return self.inner.arrays()


def watch(
    verifier: Verifier,
    proposer: Proposer,
    prompt: Sequence[int],
    options: DecodingOptions,
    planner: Planner,
    drafter: Any = None,
    ends: Collection[int] = (),
) -> Generator[tuple[WatchedStep | None, list[int]]]:
    """Decodes one text, step by step.

    Args:
        verifier, proposer, options, planner: as for `speculative`.
        prompt: token ids.
        drafter: a recurrent one says how probable its candidates are; any other, or None, does not.
        ends: tokens after the first of which nothing is decoded.

    Yields:
        each step with its tokens, at most `max_tokens` of them in all; first None, with the
        token that follows the prompt.
    """
    watched, cache, made, root = Watched(proposer), verifier.make_cache(), 0, 0
    for produced in speculative(verifier, watched, mx.array([list(prompt)]), cache, options, planner):
        tokens = produced.tokens if options.max_tokens < 0 else produced.tokens[: options.max_tokens - made]
        last = next((i for i, token in enumerate(tokens) if token in ends), None)
        tokens = tokens if last is None else tokens[: last + 1]
        made += len(tokens)
        step = None
        if isinstance(produced.plan, Plain):
            if not produced.from_prompt:
                step = WatchedStep([Node(root, 0, 0, True, None)], tokens)
        else:
            projected, tree, accepted = watched.steps.popleft()
            probabilities: Sequence[float | None] = [None] * tree.rows
            by_lookup = isinstance(produced.plan, LookedUp) and produced.drafts > 0
            if isinstance(drafter, RecurrentDrafter) and projected is not None and not by_lookup:
                probabilities = node_probabilities(drafter, verifier.target.embed, projected, tree)
            step = WatchedStep(_nodes(tree, accepted, probabilities), tokens, by_lookup)
        yield step, tokens
        root = tokens[-1]
        if last is not None:
            return


def node_probabilities(
    drafter: RecurrentDrafter, embed: Embedder, projected: mx.array, tree: CandidateTree
) -> list[float | None]:
    """The drafter's probability of every row of a tree (batch size 1), given the path to its parent.

    Args:
        projected: (1, exit_dim) what the drafter made of the context.

    Returns:
        one per row; None for the root, and for tokens that the drafter cannot draft.
    """
    tokens, parents = wait_for(tree.tokens)[0], wait_for(tree.parents)[0]
    states: list[mx.array] = []
    for row, token in enumerate(tokens):
        above = None if row == 0 else states[parents[row]]
        states.append(drafter.advance(embed(mx.array([token])), above))
    logits = drafter.logits(projected, mx.concatenate(states)).astype(mx.float32)
    shares = mx.softmax(logits, axis=-1)
    ids: Any = drafter.get("vocab_map", mx.arange(drafter.config.scored)).tolist()
    drafts = {target: draft for draft, target in enumerate(ids)}
    found: list[float | None] = [None]
    for row, token in enumerate(tokens[1:], 1):
        draft = drafts.get(token)
        share: Any = None if draft is None else shares[parents[row], draft].item()
        found.append(share)
    return found


def _nodes(tree: CandidateTree, accepted: Accepted, probabilities: Sequence[float | None]) -> list[Node]:
    """The tree on the host; rows that only fill the shape are left out."""
    [count] = wait_for(accepted.count)
    path = set(wait_for(accepted.path)[0][: count + 1])
    tokens, parents, depths, valid = (wait_for(a)[0] for a in (tree.tokens, tree.parents, tree.depths, tree.valid))
    seats: dict[int, int] = {}
    nodes: list[Node] = []
    for row in range(tree.rows):
        if valid[row]:
            seats[row] = len(nodes)
            nodes.append(Node(tokens[row], seats[parents[row]], depths[row], row in path, probabilities[row]))
    return nodes
