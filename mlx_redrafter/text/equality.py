"""Compares texts token for token: the one place that says what "equal to plain" means.

Knows nothing of how a text was written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence


def first_difference(plain: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs, a missing one included; None for equal texts."""
    if list(plain) == list(other):
        return None
    pairs = enumerate(zip(plain, other, strict=False))
    return next((i for i, (mine, its) in pairs if mine != its), min(len(plain), len(other)))


@dataclasses.dataclass
class Equality:
    """How many texts are the plain ones.

    Attributes:
        texts, equal: how many were compared, and how many of them are equal.
        tokens, before: tokens of the plain texts, and those before each text's first difference.
    """

    texts: int = 0
    equal: int = 0
    tokens: int = 0
    before: int = 0

    def add(self, plain: Sequence[int], other: Sequence[int]) -> int | None:
        """Counts one more text. Returns the index of its first difference, None if it is equal."""
        at = first_difference(plain, other)
        self.texts += 1
        self.equal += at is None
        self.tokens += len(plain)
        self.before += len(plain) if at is None else at
        return at

    def __str__(self) -> str:
        return f"{self.equal} of {self.texts}"


def compare_texts(pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Equality:
    """Compares (plain, other) token ids."""
    found = Equality()
    for plain, other in pairs:
        found.add(plain, other)
    return found
