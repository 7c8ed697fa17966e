"""Chooses where a text looks its drafts up in itself, from how far lookups have been right.

Knows nothing of the device. The text is the same whoever proposes, so what a lookup would
have brought at a step is known once the text has gone on: the host looks the same tokens up
in its own index and compares. Texts repeat themselves in stretches, so how far a lookup
will be right is told by for how many tokens lookups have been right so far.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Container

from mlx_redrafter.decoding.planner import StepRead
from mlx_redrafter.drafting.lookup import TextIndex
from mlx_redrafter.drafting.shape import ON, Drafted, LookedUp, Plan
from mlx_redrafter.tuning.acceptance_model import RunningShare

COUNTS = (1, 2, 3, 4, 5, 6, 7, 11, 15)  # tokens of a lookup, to choose from
DEEPEST = max(COUNTS)
# Classes of steps: where nothing is found, then by streak (see `TextIndex`), the lowest of each.
# And the share of right tokens, one by one, that is assumed of a class until some were seen.
STREAKS, ASSUMED = (0, 1, 2, 4, 8, 16), (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
WEIGHT, MEMORY = 3.0, 50.0  # lookups that an assumption is worth, and after which one counts e times less
BETTER = 1.05  # by how much a lookup has to be faster than what would be drafted otherwise
JOINS = 1.0  # tokens of a lookup that should be right for it to join a tree


class LookupMemory:
    """How many tokens of a lookup are right, and would not be forced without it, by class; outlives texts."""

    def __init__(self) -> None:
        self._shares = [[RunningShare(WEIGHT, MEMORY) for _ in range(DEEPEST)] for _ in ASSUMED]

    def learn(self, kind: int, right: int, forced: Container[int] = ()) -> None:
        """Takes a lookup of a class, of which so many tokens were right, those in some places forced by a grammar."""
        for depth, share in enumerate(self._shares[kind]):
            share.learn(depth < right and depth not in forced)

    def expected(self, kind: int) -> list[float]:
        """Right tokens to expect of a lookup of 0, 1, 2, ... DEEPEST tokens."""
        shares = (share.share(ASSUMED[kind] ** (depth + 1)) for depth, share in enumerate(self._shares[kind]))
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


class LookupController(LookupFollower):
    """Follows one text (batch size 1).

    Args:
        index: the text so far; whoever proposes extends it.
        mode: "auto", or "on" to look up wherever something is found.
        memory: of all texts of a pair.
        seconds: of a lookup of so many tokens behind so many.
        longest: tokens of a lookup at most.
    """

    def __init__(
        self,
        index: TextIndex,
        mode: str,
        memory: LookupMemory,
        seconds: Callable[[int, int], float],
        longest: int = DEEPEST,
    ):
        super().__init__(index, memory)
        self.mode = mode
        self._seconds = seconds
        self._longest, self._counts = longest, [count for count in COUNTS if count <= longest]

    def plan(self, plan: Plan, length: int, speed_of: Callable[[int], float]) -> Plan:
        """What was planned, or a lookup in its place or beside it where that should bring more tokens per second.

        Args:
            plan: what would be drafted otherwise.
            length: tokens in the KV cache.
            speed_of: tokens per second without lookup behind so many tokens.
        """
        kind = self.kind
        if self.mode == ON:
            if isinstance(plan, Drafted):
                return Drafted(plan.shape, with_lookup=True)
            return LookedUp(self._longest) if kind else plan
        if not kind:
            return plan
        right = self.memory.expected(kind)
        best, speed = plan, BETTER * speed_of(length)
        for count in self._counts:
            if (rate := (1 + right[count]) / self._seconds(count, length)) > speed:
                best, speed = LookedUp(count), rate
        if best is plan and isinstance(plan, Drafted) and plan.shape.beam_width > 1:
            joins = right[min(plan.shape.beam_length - 1, DEEPEST)] > JOINS
            return Drafted(plan.shape, with_lookup=joins)
        return best
