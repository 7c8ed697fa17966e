"""Averages that follow what changes: a share that starts from an assumption, medians of the last few.

Knows nothing of what is averaged.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Hashable

SHARED = 0.75  # of what is slow (as a power) that is taken to be slow of everything beside it, too


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


class RecentMedian:
    """The median of the last values.

    Args:
        size: how many.
    """

    def __init__(self, size: int):
        self.values: deque[float] = deque(maxlen=size)
        self._median: float | None = None

    def learn(self, value: float) -> None:
        self.values.append(value)
        self._median = None

    def value(self, assumed: float, trusted: int) -> float:
        """The median; while there are fewer values than are trusted, drawn towards what is assumed."""
        if not self.values:
            return assumed
        if self._median is None:
            self._median = statistics.median(self.values)
        trust = min(1.0, len(self.values) / trusted)
        return trust * self._median + (1 - trust) * assumed


class Slowness:
    """How much slower than expected several kinds of things are, in groups that are slow or fast together.

    Args:
        size: values of a kind that count.
        trusted: from so many on a kind, or a group, goes by its own alone.
    """

    def __init__(self, size: int, trusted: int):
        self.size, self.trusted = size, trusted
        self._seen: dict[tuple[Hashable, ...], RecentMedian] = {}

    def learn(self, group: Hashable, kind: Hashable, ratio: float) -> None:
        """Takes a measured over an expected value."""
        for key in ((), (group,), (group, kind)):
            self._seen.setdefault(key, RecentMedian(self.size)).learn(ratio)

    def value(self, group: Hashable, kind: Hashable) -> float:
        """As lately measured; while that is little, as for the group, and then for all."""
        found = 1.0
        for key in ((), (group,)):
            if key in self._seen:
                found = self._seen[key].value(found, self.trusted)
        found **= SHARED
        own = self._seen.get((group, kind))
        return found if own is None else own.value(found, self.trusted)
