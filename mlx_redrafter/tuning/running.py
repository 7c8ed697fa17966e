"""Averages that follow what changes: a share that starts from an assumption, a median of the last few.

Knows nothing of what is averaged.
"""

from __future__ import annotations

import statistics
from collections import deque


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
