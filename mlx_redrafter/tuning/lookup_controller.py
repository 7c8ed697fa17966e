"""What lookup is worth at a step, from what the host has read anyway.

The text is the same whoever proposes. So what a lookup would have brought at a step is
known once the text has gone on, without having asked the device for it: the host looks the
same tokens up in its own index and compares. Texts repeat themselves in stretches, so how
far a lookup will be right is told by for how many tokens lookups have been right so far.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import statistics
import time
from collections import deque
from typing import Protocol

from mlx_redrafter.drafting.shape import DraftShape, LookupChain

DEEPEST = 15  # tokens of a lookup that is followed
CHAINS = {n: LookupChain.of(n) for n in (1, 2, 3, 4, 5, 6, 7, 11, 15)}  # lookups to choose from, by tokens
# Classes of steps: where nothing was found, then by streak (see `TextIndex`), the lowest of each.
# And the share of right tokens, one by one, that is assumed of a class until some were seen.
STREAKS, ASSUMED = (0, 1, 2, 4, 8, 16), (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
WEIGHT = 3.0  # lookups that an assumption is worth
FORGET = 0.98  # of what was seen of a class, per lookup of it
BETTER = 1.05  # by how much lookup has to be faster than what would be drafted else
ENOUGH = 6  # steps of the drafter's before lookup is compared with them
RECENT = 24  # steps that averages and measured times remember
PROBE = 8  # one in so many steps with lookup goes without: what it is compared with, where prices do not tell
ASSUMED_COST = 1.1  # of a step with lookup in steps without, until it has been measured
STALE = 96  # steps without lookup after which its measured cost is not trusted any more


class Prices(Protocol):
    """What steps cost and bring, where that has been measured."""

    def seconds(self, shape: DraftShape | None, length: int) -> float:
        """Of a step of a shape behind `length` tokens."""

    def speed(self, length: int) -> float:
        """Tokens per second there without lookup."""


class TextIndex:
    """The text on the host, and where each short run of its tokens ended last.

    Args:
        shortest, longest: tokens of the runs, as on the device.

    Attributes:
        streak: how many of the last tokens lookup would have said, each from those before it.
    """

    def __init__(self, shortest: int, longest: int):
        self.tokens: list[int] = []
        self.streak = 0
        self._ends: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in range(shortest, longest + 1)}

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
        for length in sorted(self._ends, reverse=True):
            at = self._ends[length].get(tuple(self.tokens[-length:]))
            if at is not None and len(self.tokens) >= length:
                period = len(self.tokens) - 1 - at
                return [self.tokens[at + 1 + i % period] for i in range(count)]
        return []


class _Average:
    """A mean over about the last RECENT values."""

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, RECENT)


class Reach:
    """How many tokens of a lookup are right, for steps of one class."""

    def __init__(self, assumed: float):
        self._assumed = [assumed ** (depth + 1) for depth in range(DEEPEST)]
        self._right = [0.0] * DEEPEST  # lookups of which so many tokens and one were right
        self._seen = 0.0

    def learn(self, right: int) -> None:
        """Takes a lookup of which so many tokens were right."""
        self._seen = FORGET * self._seen + 1
        self._right = [FORGET * count + (depth < right) for depth, count in enumerate(self._right)]

    def expected(self) -> list[float]:
        """Right tokens to expect of a lookup of 0, 1, 2, ... DEEPEST tokens."""
        known = self._seen + WEIGHT
        shares = ((right + WEIGHT * assumed) / known for right, assumed in zip(self._right, self._assumed))
        return list(itertools.accumulate(shares, initial=0.0))


@dataclasses.dataclass
class _Step:
    """A step that was built.

    Attributes:
        shape: of what was drafted.
        kind: its class.
        joined: whether lookup's branch was in its tree.
        share: rows that such a branch gets; 0 where none can join.
    """

    shape: DraftShape | None
    kind: int
    joined: bool
    share: int

    @property
    def with_lookup(self) -> bool:
        return self.joined or isinstance(self.shape, LookupChain)


class LookupMemory:
    """What was seen of lookups, by class; outlives texts.

    Attributes:
        reach: how many of their tokens are right.
        gain: accepted tokens that a branch of lookup's would have added to a tree.
    """

    def __init__(self) -> None:
        self.reach = [Reach(assumed) for assumed in ASSUMED]
        self.gain = [_Average() for _ in ASSUMED]


class LookupWorth:
    """Chooses between the drafter, lookup, and both in one tree, step by step (batch size 1).

    Args:
        shortest, longest: tokens that are compared, as on the device.
        alone: there is no drafter, so a step without lookup is a plain one.
        prices: measured beforehand; without, times of steps are compared as they come.
        memory: shared by all texts of a pair; begun anew if left out.
    """

    def __init__(
        self,
        shortest: int,
        longest: int,
        alone: bool = False,
        prices: Prices | None = None,
        memory: LookupMemory | None = None,
    ):
        self._limits, self._alone, self.prices = (shortest, longest), alone, prices
        self.memory = memory or LookupMemory()
        self.begin([])

    def begin(self, text: list[int]) -> None:
        """Starts another text, with the tokens before the root."""
        self.index = TextIndex(*self._limits)
        self.index.extend(text)
        self._rooted = False
        self._built: deque[_Step] = deque()
        self._open: list[tuple[_Step, int, int, list[int]]] = []  # step, its root's index, accepted, the lookup
        self.length = _Average()  # tokens of a step without lookup
        self._seconds: dict[bool, deque[float]] = {used: deque(maxlen=RECENT) for used in (False, True)}
        self._before = 0.0
        self._since = 0  # steps since one with lookup
        self._probes = 0  # steps with lookup, and those that went without to compare

    @property
    def kind(self) -> int:
        """The class of a step that is built now."""
        return bisect.bisect_right(STREAKS, self.index.streak) if self.index.continuation(1) else 0

    def choose(self, shape: DraftShape | None) -> DraftShape | None:
        """The shape itself, or a lookup in its place where that should bring more tokens per second.

        Args:
            shape: what would be drafted else; what lookup may draft, where there is no drafter.
        """
        right = self.memory.reach[self.kind].expected()
        if self.prices is not None:
            return self._by_prices(self.prices, shape, right)
        return None if shape is None else self._by_comparison(shape, right)

    def _by_prices(self, prices: Prices, shape: DraftShape | None, right: list[float]) -> DraftShape | None:
        """With a lookup of any length. `right`: tokens that lookups of 0, 1, 2, ... should get right."""
        length, best = len(self.index.tokens), shape
        # Not the shape's own speed: it may be one that is only tried for a few steps.
        speed = BETTER * prices.speed(length)
        for count, chain in CHAINS.items():
            found = (1 + right[count]) / prices.seconds(chain, length)
            if found > speed:
                best, speed = chain, found
        return best

    def _by_comparison(self, shape: DraftShape, right: list[float]) -> DraftShape | None:
        """With a lookup of as many rows, by what steps brought and took so far."""
        other = None if self._alone else shape
        usual = 1.0 if self._alone else self.length.value
        if not self._alone and self.length.count < ENOUGH:
            return other
        chain = LookupChain.of(min(shape.num_draft_tokens, DEEPEST))
        if 1 + right[chain.num_draft_tokens] <= BETTER * usual * self.cost:
            return other
        return other if self._probes % PROBE == PROBE - 1 else chain

    def joins(self) -> bool:
        """Whether a branch should join the tree that is built now."""
        gain = self.memory.gain[self.kind]
        if min(gain.count, self.length.count) < ENOUGH:
            return False
        if self.length.value + gain.value <= self.length.value * self._join_cost:
            return False
        return self._probes % PROBE != PROBE - 1

    def built(self, shape: DraftShape | None, joined: bool, share: int) -> None:
        """Told of each step as it is built; see `_Step`."""
        step = _Step(shape, self.kind, joined, share)
        self._built.append(step)
        self._probes = self._probes + 1 if step.with_lookup or self._probes % PROBE == PROBE - 1 else self._probes
        self._since = 0 if step.with_lookup else self._since + 1
        if self._since >= STALE:
            self._seconds[True].clear()

    def learn(self, tokens: list[int]) -> None:
        """Takes what a step brought; the first call brings the root that the prompt led to."""
        now = time.perf_counter()
        if self._rooted:
            step = self._built.popleft()
            root = len(self.index.tokens) - 1
            self._open.append((step, root, len(tokens) - 1, self.index.continuation(DEEPEST)))
            self._seconds[step.with_lookup].append(now - self._before)
            if step.shape is not None and not step.with_lookup:
                self.length.add(len(tokens))
        self._rooted, self._before = True, now
        self.index.extend(tokens)
        self._open = [one for one in self._open if not self._settle(*one)]

    @property
    def cost(self) -> float:
        """Time of a step with lookup relative to one without, as measured in this text."""
        without, used = self._seconds[False], self._seconds[True]
        if min(len(without), len(used)) < 3:
            return ASSUMED_COST
        return statistics.median(used) / statistics.median(without)

    @property
    def _join_cost(self) -> float:
        # Where prices are known, steps of many shapes take turns, and their times say nothing of one.
        return ASSUMED_COST if self.prices is not None else self.cost

    def _settle(self, step: _Step, root: int, accepted: int, lookup: list[int]) -> bool:
        """Compares a lookup with the text; False while the text is not long enough to tell."""
        text = self.index.tokens[root + 1 : root + 1 + len(lookup)]
        right = next((i for i, (a, b) in enumerate(zip(lookup, text)) if a != b), len(text))
        if right == len(text) < len(lookup):
            return False
        self.memory.reach[step.kind].learn(right)
        if step.share and not step.with_lookup:
            assert step.shape is not None
            reached = min(right, step.shape.beam_length - 1)  # a branch is no longer than the tree is deep
            self.memory.gain[step.kind].add(min(max(reached - accepted, 0), step.share))
        return True
