"""Proposes what followed the last time the text ended like this; knows nothing of what a lookup is worth.

Texts repeat themselves and their prompts: names, quotations, code that is being edited.
The longest run of tokens that ends in the root is looked for in the text so far, the most
recent place wins, and what followed there is proposed (prompt lookup, as in Saxena's
prompt-lookup-decoding and transformers' assisted generation). That joins the tree of another
proposer, takes the place of a chain, or stands alone. The device has a copy of the text while
it is looked up, so that no step waits to be read; the host's index tells what is found there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_redrafter.drafting.proposers import Proposer
from mlx_redrafter.drafting.shape import Drafted, LookedUp, Plan
from mlx_redrafter.target.cache.attention import BLOCK
from mlx_redrafter.target.tree import CandidateTree, Places
from mlx_redrafter.target.verification import Accepted, accept

LONGEST = 4  # tokens that are compared
SHORTEST = 2  # tokens that have to agree, the last one among them
NOTHING = -1  # stands where there is no token
KEPT = 8  # steps without lookup after which the device's copy of the text is given up


class TextIndex:
    """The text so far on the host, and where each short run of its tokens ended last.

    Args:
        tokens: the text before the first step.

    Attributes:
        tokens: the text.
        streak: how many of the last tokens lookup would have said, each from those before it.
    """

    def __init__(self, tokens: list[int]):
        self.tokens: list[int] = []
        self.streak = 0
        self._ends: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in range(LONGEST, SHORTEST - 1, -1)}
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        """Appends tokens. What ends in the last one is not a place to look at yet."""
        for token in tokens:
            self.streak = self.streak + 1 if self.continuation(1) == [token] else 0
            end = len(self.tokens) - 1
            for length, ends in self._ends.items():
                if end + 1 >= length:
                    ends[tuple(self.tokens[end + 1 - length :])] = end
            self.tokens.append(token)

    def continuation(self, count: int) -> list[int]:
        """What followed the most recent of the longest matches; empty if there is none."""
        for length, ends in self._ends.items():
            at = ends.get(tuple(self.tokens[-length:]))
            if at is not None and len(self.tokens) >= length:
                period = len(self.tokens) - 1 - at
                return [self.tokens[at + 1 + i % period] for i in range(count)]
        return []


class TextBuffer:
    """The text so far on the device, the root at its end; grows in blocks like the KV cache.

    Args:
        text: (B, n) int32, n at least 1, the root last.

    Attributes:
        tokens: (B, capacity) int32; LONGEST - 1 times NOTHING stands before the text.
        end: (B,) int32 index of the root.
    """

    def __init__(self, text: mx.array):
        before = LONGEST - 1
        # No token, so that what stands there matches nothing; token 0 would.
        self.tokens = mx.pad(text.astype(mx.int32), [(0, 0), (before, 0)], constant_values=NOTHING)
        self.end = mx.full((text.shape[0],), before + text.shape[1] - 1, mx.int32)
        self._bound = self.tokens.shape[1]  # rows that may be in use, known to the host

    def extend(self, accepted: Accepted) -> None:
        """Takes a step's tokens, of which count + 1 stay; its last one is the new root."""
        self._bound += accepted.tokens.shape[1]
        if (more := -(-(self._bound - self.tokens.shape[1]) // BLOCK) * BLOCK) > 0:
            self.tokens = mx.pad(self.tokens, [(0, 0), (0, more)], constant_values=NOTHING)
        self.tokens = Places(self.end + 1).write(self.tokens, accepted.tokens, axis=1)
        self.end = self.end + accepted.count + 1

    def tighten(self, unused: int) -> None:
        """Tells the host's bound how many tokens of a step were not accepted."""
        self._bound -= unused

    def limit(self, longest: int) -> None:
        """Tells the host's bound that no text has more tokens."""
        self._bound = min(self._bound, LONGEST - 1 + longest)

    def join(self, other: TextBuffer) -> None:
        """Takes other texts behind these."""
        rows = max(self.tokens.shape[1], other.tokens.shape[1])
        both = [
            mx.pad(a, [(0, 0), (0, rows - a.shape[1])], constant_values=NOTHING) for a in (self.tokens, other.tokens)
        ]
        self.tokens, self.end = mx.concatenate(both), mx.concatenate([self.end, other.end])
        self._bound = max(self._bound, other._bound)

    def keep(self, texts: mx.array) -> None:
        """Keeps these texts, in this order."""
        self.tokens, self.end = self.tokens[texts], self.end[texts]

    def continuation(self, count: int) -> tuple[mx.array, mx.array]:
        """What followed the most recent of the longest matches.

        Where the match is close to the end, what follows it runs into the root and goes on
        from behind the match: a repetition is continued.

        Returns:
            tokens (B, count) int32, and whether there was a match, (B,) bool.
        """
        batch, capacity = self.tokens.shape
        places = capacity - LONGEST + 1  # place i holds the LONGEST tokens that end at i + LONGEST - 1
        windows = mx.as_strided(self.tokens, (batch, places, LONGEST), (capacity, 1, 1))
        last = mx.take_along_axis(self.tokens, self.end[:, None] + mx.arange(1 - LONGEST, 1), axis=1)
        same = (windows == last[:, None]).astype(mx.int32)
        length = mx.sum(mx.cumprod(same, axis=2, reverse=True), axis=2)
        place = mx.arange(places, dtype=mx.int32)
        earlier = place < self.end[:, None] - (LONGEST - 1)
        score = mx.where(earlier, length * places + place, 0)
        found = mx.max(score, axis=1) >= SHORTEST * places
        at = mx.argmax(score, axis=1).astype(mx.int32) + (LONGEST - 1)
        period = mx.maximum(self.end - at, 1)
        ahead = mx.arange(count, dtype=mx.int32) % period[:, None]
        return mx.take_along_axis(self.tokens, at[:, None] + 1 + ahead, axis=1), found


def join(tree: CandidateTree, tokens: mx.array, found: mx.array, share: int) -> CandidateTree:
    """A tree whose last rows make way for one more branch, where there is one.

    As far as the branch runs along rows that stay, it shares them, so no candidate is there
    twice. Where nothing was found, or all of it is in the tree already, the tree stays.

    Args:
        tree: 1 + N rows, parents before children; the last rows are given up.
        tokens: (B, D) the branch, from the root's successor on.
        found: (B,) bool, False where there is no branch.
        share: rows that may go to the branch, 1 to N.
    """
    stay, (batch, depth) = tree.rows - share, tokens.shape
    kept = CandidateTree(
        tree.tokens[:, :stay],
        tree.parents[:, :stay],
        tree.depths[:, :stay],
        tree.ancestors[:, :stay, :stay],
        tree.valid[:, :stay],
        tree.max_depth,
    )
    # The branch walks through the tree as though it were what the target chooses.
    walked = accept(kept, mx.take_along_axis(tokens, mx.minimum(kept.depths, depth - 1), axis=1))
    # At depth D its last token was asked for once more; no row there can have children.
    level = walked.count[:, None] + mx.arange(share, dtype=mx.int32)
    joins = (found & (walked.count < depth))[:, None]
    new_rows = mx.broadcast_to(stay + mx.arange(share - 1, dtype=mx.int32), (batch, share - 1))
    above = mx.concatenate([walked.last[:, None], new_rows], axis=1)
    new = mx.take_along_axis(tokens, mx.minimum(level, depth - 1), axis=1)
    return CandidateTree.from_parents(
        mx.concatenate([kept.tokens, mx.where(joins, new, tree.tokens[:, stay:])], axis=1),
        mx.concatenate([kept.parents, mx.where(joins, above, tree.parents[:, stay:])], axis=1),
        max_depth=max(tree.max_depth, depth),
        valid=mx.concatenate([kept.valid, mx.where(joins, level < depth, tree.valid[:, stay:])], axis=1),
    )


class LookupProposer(Proposer):
    """Puts what lookup finds in the place of another proposer's drafts, or beside them in one tree.

    With `Drafted.with_lookup` half of a tree's rows go to the lookup where it finds something
    that the tree has not got; a chain is replaced as a whole.

    Args:
        inner: the other proposer, a head; a plain `Proposer` where lookup alone drafts.
        index: the text so far on the host, which this proposer extends; None for a text of a batch, which is on the
            device from its beginning to its end.
        before: tokens in front of the prompt, of a text of a batch.
    """

    def __init__(self, inner: Proposer, index: TextIndex | None, before: Sequence[int] = ()):
        self.inner, self.index, self._before = inner, index, list(before)
        self.context_layers, self.prefix_window = inner.context_layers, inner.prefix_window
        self.from_any_root = inner.from_any_root
        self.text: TextBuffer | None = None  # while it is needed
        self._unused = 0  # steps since it was
        self._root: mx.array | None = None  # until the host has read it
        self._in_flight: deque[Accepted] = deque()

    def begin(self, text: mx.array, root: mx.array, contexts: mx.array) -> None:
        self.inner.begin(text, root, contexts)
        self.text, self._unused, self._root = None, 0, root
        self._in_flight.clear()
        if self.index is None:
            before = [mx.array([self._before], text.dtype)] if self._before else []
            self.text = TextBuffer(mx.concatenate([*before, text, root[:, None]], axis=1))
        elif text.shape[0] > 1:  # the host follows one text only
            self.text = TextBuffer(mx.concatenate([text, root[:, None]], axis=1))

    def propose(self, context: mx.array, root: mx.array, plan: Plan, chain_only: bool = False) -> CandidateTree:
        if isinstance(plan, LookedUp):
            tree, depth = None, plan.num_draft_tokens
        else:
            assert isinstance(plan, Drafted)
            tree = self.inner.propose(context, root, plan, chain_only)
            self.projected = self.inner.projected
            if not plan.with_lookup or tree.rows == 1:
                return tree
            depth = min(plan.shape.beam_length - 1, plan.shape.num_draft_tokens)
        self._unused = 0
        if self.text is None:  # given up: made from the host's copy
            assert self.index is not None
            text = mx.array([self.index.tokens], mx.int32)
            if self._root is not None:
                text = mx.concatenate([text, self._root[:, None].astype(mx.int32)], axis=1)
            self.text = TextBuffer(text)
            for accepted in self._in_flight:  # built, and not read by the host yet
                self.text.extend(accepted)
        tokens, found = self.text.continuation(depth)
        if tree is not None and not tree.in_order:
            return join(tree, tokens, found, share=max(1, (tree.rows - 1) // 2))
        if tree is not None:
            drafted = tree.tokens[:, 1 : 1 + depth]
            tokens = mx.where(found[:, None], tokens[:, : drafted.shape[1]], drafted)
        alone = found if tree is None else None
        return CandidateTree.chain(mx.concatenate([root[:, None].astype(mx.int32), tokens], axis=1), alone)

    def advance(self, accepted: Accepted, contexts: mx.array) -> None:
        self.inner.advance(accepted, contexts)
        if self.text is not None:
            self.text.extend(accepted)
        if self.index is None:
            return
        self._in_flight.append(accepted)
        self._unused += 1
        if self.text is not None and self._unused > KEPT and self.text.tokens.shape[0] == 1:
            self.text = None

    def leave(self, cache: Any, tokens: int, dropped: int, context: mx.array) -> None:
        self.inner.leave(cache, tokens, dropped, context)

    def resume(self, cache: Any, tokens: int) -> None:
        self.inner.resume(cache, tokens)

    def learn(self, tokens: list[int]) -> None:
        if self._root is None:
            read = self._in_flight.popleft()
            if self.text is not None:
                self.text.tighten(read.tokens.shape[1] - len(tokens))
        self._root = None
        assert self.index is not None  # nobody tells of a text of a batch
        self.index.extend(tokens)
        self.inner.learn(tokens)

    def tighten(self, longest: int) -> None:
        self.inner.tighten(longest)
        if self.text is not None:
            self.text.limit(longest)

    def join(self, other: Proposer) -> None:
        assert isinstance(other, LookupProposer) and self.text is not None and other.text is not None
        self.text.join(other.text)
        self.inner.join(other.inner)

    def keep(self, texts: list[int]) -> None:
        assert self.text is not None
        self.text.keep(mx.array(texts))
        self.inner.keep(texts)

    def arrays(self) -> list[mx.array]:
        return self.inner.arrays() + ([] if self.text is None else [self.text.tokens, self.text.end])
