"""Expects how many draft tokens of a shape, or of a lookup, are accepted, from how often drafts were right.

Knows nothing of time. Every share of a drafter's is a conditional one: of the steps that got to a node
and had a child of that rank there to check, how many took it. So steps of any shape tell about
all others, and a tree that ended early counts neither for nor against what it did not hold
(Kaplan and Meier's estimate, with depth in place of time). Texts differ more from one another
than within themselves, so each has its own counts, with those of all texts as the assumption;
those of a batch go by all texts alone.

The text is the same whoever proposes. So what a lookup would have brought at a step is known
once the text has gone on: the host looks the same tokens up in its own index and compares.
Texts repeat themselves in stretches, so how far a lookup will be right is told by for how
many tokens lookups have been right so far.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import operator
from collections.abc import Container, Iterator
from typing import Any

from mlx_redrafter.decoding.planner import StepRead
from mlx_redrafter.drafting.lookup import TextIndex
from mlx_redrafter.drafting.shape import DraftShape

DEPTHS, RANKS = 10, 8  # that are told apart; deeper tokens are taken to be as good as the last
FIRST = 0.65  # assumed share of right best children
NEXT = (0.4, 0.3, 0.25, 0.2, 0.2, 0.15, 0.15)  # and of the second, third, ... child where all before it were wrong
WEIGHT, MEMORY = 3.0, 192.0  # steps that an assumption is worth, and after which one counts e times less
TEXT_WEIGHT = 6.0  # steps of a text that what all texts have shown is worth
ENOUGH = 8.0  # steps that got to a depth, for its share to be known
DEEPEST = 15  # tokens of the longest lookup
# Classes of steps: where nothing is found, then by streak (see `TextIndex`), the lowest of each.
# And the share of right tokens, one by one, that is assumed of a class until some were seen.
STREAKS, LOOKUP_ASSUMED = (0, 1, 2, 4, 8, 16), (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LOOKUP_WEIGHT, LOOKUP_MEMORY = 3.0, 50.0  # lookups that an assumption is worth, and after which one counts e times less


class RunningShare:
    """Successes over tries, where old ones count less and new ones have an assumption to outvote.

    Args:
        weight: tries that an assumption is worth.
        memory: tries after which one counts e times less.
    """

    def __init__(self, weight: float, memory: float):
        self.weight, self.keep = weight, 1 - 1 / memory
        self.hits = self.tries = 0.0

    def learn(self, hits: float, tries: float = 1.0) -> None:
        """Takes so many successes in so many tries."""
        self.hits = self.keep * self.hits + hits
        self.tries = self.keep * self.tries + tries

    def fade(self, factor: float) -> None:
        """Makes all that was seen so far count less."""
        self.hits, self.tries = factor * self.hits, factor * self.tries

    def share(self, assumed: float) -> float:
        """Close to what is assumed as long as little was seen."""
        return (self.hits + self.weight * assumed) / (self.tries + self.weight)


class AcceptanceModel:
    """What is known of how often a drafter is right.

    Args:
        assumed: shares of right best children by depth, of which training measured some.
        above: what is known from all texts, if this is what one text shows; learns with it, and is assumed before.

    Attributes:
        steps: drafted steps seen.
    """

    def __init__(self, assumed: list[float] | None = None, above: AcceptanceModel | None = None):
        self.assumed, self.above, self.steps = assumed or [], above, 0
        weight = WEIGHT if above is None else TEXT_WEIGHT
        self.first = [RunningShare(weight, MEMORY) for _ in range(DEPTHS)]
        self.later = [RunningShare(weight, MEMORY) for _ in range(RANKS - 1)]
        self._changes, self._above_changes = 0, -1  # of what is known, here and above
        self._shares: tuple[list[float], list[float]] | None = None
        self._expected: dict[DraftShape, float] = {}

    def learn(self, step: StepRead) -> None:
        """Takes a step of the drafter's own."""
        seen = list(_looked_at(step))
        for model in (self,) if self.above is None else (self, self.above):
            model.steps += 1
            model._forget_expected()
            for depth, children, taken in seen:
                model.first[depth].learn(taken == 0)
                for rank in range(1, min(children, taken + 1, RANKS)):
                    model.later[rank - 1].learn(taken == rank)

    def fade(self, factor: float) -> None:
        """Makes what was seen so far count less, in this text if it is one's."""
        for share in (*self.first, *self.later):
            share.fade(factor)
        self._forget_expected()

    def _forget_expected(self) -> None:
        self._changes += 1
        self._shares = None
        self._expected.clear()

    def _heed_others(self) -> None:
        """Forgets what was computed before other texts taught what is above."""
        if self.above is not None and self._above_changes != self.above._changes:
            self._forget_expected()
            self._above_changes = self.above._changes

    def shares(self) -> tuple[list[float], list[float]]:
        """Of right best children by depth, and of right second, third, ... ones where those before were wrong."""
        self._heed_others()
        if self._shares is None:
            self._shares = self._of_all_texts() if self.above is None else self._of_this_text(*self.above.shares())
        return self._shares

    def _of_all_texts(self) -> tuple[list[float], list[float]]:
        first: list[float] = []
        for depth, share in enumerate(self.first):
            above = first[-1] if first else FIRST  # where little was seen, as good as one level up
            first.append(share.share(self.assumed[depth] if depth < len(self.assumed) else above))
        poor = min(1.0, first[0] / FIRST)  # a drafter whose best child is poor has no good second one
        return first, [share.share(poor * assumed) for share, assumed in zip(self.later, NEXT, strict=True)]

    def _of_this_text(self, first: list[float], later: list[float]) -> tuple[list[float], list[float]]:
        return (
            [share.share(assumed) for share, assumed in zip(self.first, first, strict=True)],
            [share.share(assumed) for share, assumed in zip(self.later, later, strict=True)],
        )

    def known(self) -> tuple[float, ...]:
        """Shares of right best children at depth 1, 2, ... as far as they were seen often enough to say."""
        seen = [share for share in self.first if share.tries >= ENOUGH]
        return tuple(round(share.hits / share.tries, 3) for share in seen)

    def expected(self, shape: DraftShape) -> float:
        """Draft tokens of one step that should be accepted.

        They are the sum, over the nodes of a tree, of the probability that the target's text
        runs through them; a best-first tree holds the most probable nodes of a beam search.
        """
        self._heed_others()
        if shape not in self._expected:
            first, later = self.shares()
            grown = _chain(first, shape) if shape.beam_width == 1 else _tree(first, later, shape)
            self._expected[shape] = sum(grown)
        return self._expected[shape]

    def to_dict(self) -> dict[str, Any]:
        """What JSON keeps."""
        return {
            "steps": self.steps,
            "first": [[share.hits, share.tries] for share in self.first],
            "later": [[share.hits, share.tries] for share in self.later],
        }

    def restore(self, fields: dict[str, Any]) -> None:
        """Takes what `to_dict` gave. Raises ValueError, TypeError or KeyError for anything else."""
        steps, counted = int(fields["steps"]), [*fields["first"], *fields["later"]]
        shares = [*self.first, *self.later]
        if len(counted) != len(shares) or not all(0 <= hits <= tries < float("inf") for hits, tries in counted):
            raise ValueError(f"no counts: {counted}")
        for share, (hits, tries) in zip(shares, counted, strict=True):
            share.hits, share.tries = hits, tries
        self.steps = steps
        self._forget_expected()


def _looked_at(step: StepRead) -> Iterator[tuple[int, int, int]]:
    """The accepted nodes of a step that had children to check: depth, children, and the rank of the one taken."""
    chain = step.plan.num_draft_tokens if step.most is None else step.most
    below: dict[int, list[int]] = {}
    for row, parent in enumerate(step.parents or [], 0):
        if row:
            below.setdefault(parent, []).append(row)
    for depth in range(min(len(step.tokens) - step.certain, DEPTHS)):
        place = step.certain + depth
        if place in step.forced:
            continue
        right = place < len(step.tokens) - 1
        if step.parents is None or step.path is None:  # a chain
            children = int(place < chain)
            taken = 0 if right else children
        else:
            siblings = below.get(step.path[place], [])  # in the order of their probability
            children = len(siblings)
            taken = siblings.index(step.path[place + 1]) if right else children
        if children == 0:
            return
        yield depth, children, taken


def _chain(first: list[float], shape: DraftShape) -> list[float]:
    """The probability of each node of a chain."""
    nodes = min(shape.beam_length - 1, shape.num_draft_tokens)
    known = first[:nodes] + first[-1:] * (nodes - DEPTHS)
    return list(itertools.accumulate(known, operator.mul))


def _tree(first: list[float], later: list[float], shape: DraftShape) -> list[float]:
    """The same of a best-first tree."""
    level, paths = [1.0], []
    for depth in range(shape.beam_length - 1):
        right = first[min(depth, DEPTHS - 1)]
        children = []
        for path in level:
            children.append(path * right)
            rest = path * (1 - right)
            for share in later[: shape.beam_width - 1]:
                children.append(rest * share)
                rest *= 1 - share
        level = sorted(children, reverse=True)[: shape.beam_width]
        paths += level
    return sorted(paths, reverse=True)[: shape.num_draft_tokens]


class LookupMemory:
    """How many tokens of a lookup are right, and would not be forced without it, by class; outlives texts."""

    def __init__(self) -> None:
        self._shares = [[RunningShare(LOOKUP_WEIGHT, LOOKUP_MEMORY) for _ in range(DEEPEST)] for _ in LOOKUP_ASSUMED]

    def learn(self, kind: int, right: int, forced: Container[int] = ()) -> None:
        """Takes a lookup of a class, of which so many tokens were right, those in some places forced by a grammar."""
        for depth, share in enumerate(self._shares[kind]):
            share.learn(depth < right and depth not in forced)

    def expected(self, kind: int) -> list[float]:
        """Right tokens to expect of a lookup of 0, 1, 2, ... DEEPEST tokens."""
        shares = (share.share(LOOKUP_ASSUMED[kind] ** (depth + 1)) for depth, share in enumerate(self._shares[kind]))
        return list(itertools.accumulate(shares, initial=0.0))


@dataclasses.dataclass
class LookupFollower:
    """Follows one text: what lookup would say next, and how it would have fared.

    Args:
        index: the text so far; somebody else extends it.
        memory: of all texts of a pair.
    """

    index: TextIndex
    memory: LookupMemory
    # Class, place and tokens of lookups yet to be judged; places in the text that a grammar forced.
    _waiting: list[tuple[int, int, list[int]]] = dataclasses.field(default_factory=list)
    _forced: set[int] = dataclasses.field(default_factory=set)

    @property
    def kind(self) -> int:
        """The class of the step that comes next."""
        return bisect.bisect_right(STREAKS, self.index.streak) if self.index.continuation(1) else 0

    def expected(self) -> list[float]:
        """Right tokens to expect of a lookup of 0, 1, 2, ... DEEPEST tokens; none where nothing is found."""
        kind = self.kind
        return self.memory.expected(kind) if kind else [0.0] * (1 + DEEPEST)

    def learn(self, step: StepRead) -> None:
        """Judges the lookups that the text has gone past; `index` has the step's tokens already."""
        text = self.index.tokens
        self._forced.update(len(text) - len(step.tokens) + place for place in step.forced)
        still: list[tuple[int, int, list[int]]] = []
        for kind, place, tokens in self._waiting:
            seen = text[place : place + len(tokens)]
            right = next((i for i, (a, b) in enumerate(zip(tokens, seen)) if a != b), len(seen))
            if right == len(seen) < len(tokens):
                still.append((kind, place, tokens))
            else:
                self.memory.learn(kind, right, {i for i in range(right) if place + i in self._forced})
        found = self.index.continuation(DEEPEST)
        if found:
            still.append((self.kind, len(text), found))
        self._waiting = still
