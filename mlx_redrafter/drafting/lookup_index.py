"""The text so far on the host, and where each short run of its tokens ended last.

Knows nothing of the device's copy, nor of what a lookup is worth.
"""

from __future__ import annotations

LONGEST = 4  # tokens that are compared
SHORTEST = 2  # tokens that have to agree, the last one among them


class TextIndex:
    """A text that can be looked up.

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
