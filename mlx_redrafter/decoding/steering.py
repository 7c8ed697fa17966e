"""What lies between the loop and whoever chooses how much is drafted, step by step."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Protocol

from mlx_redrafter.drafting.shape import DraftShape


@dataclasses.dataclass
class Outcome:
    """How one step went, from numbers that its verification made anyway (batch size 1).

    Attributes:
        shape: how much it drafted; None for a plain step.
        accepted: draft tokens that were accepted.
        children: how many children each node of the accepted path had in the tree, from the
            root on; a path's last node had none if the tree ended there. For a chain of n,
            n ones, whatever was accepted.
        ranks: which of its parent's children each accepted node was, 0 for the best.
    """

    shape: DraftShape | None
    accepted: int
    children: list[int]
    ranks: list[int]

    @classmethod
    def of_tree(cls, shape: DraftShape | None, path: list[int], parents: list[int]) -> Outcome:
        """From a tree's rows: siblings lie in the order of their probability.

        Args:
            path: rows of the accepted path, the root (row 0) first.
            parents: each row's parent; the root is its own.
        """
        below: dict[int, list[int]] = {}
        for row, parent in enumerate(parents[1:], 1):
            below.setdefault(parent, []).append(row)
        ranks = [below[parent].index(row) for parent, row in itertools.pairwise(path)]
        return cls(shape, len(ranks), [len(below.get(row, ())) for row in path], ranks)


class Steering(Protocol):
    """Chooses the shape of every step of `decoding.speculative`."""

    def begin(self) -> None:
        """The first token of a text has been read; the first step is under way."""

    def shape(self) -> DraftShape | None:
        """How much the step that is built next should draft; None for a plain step. The proposer may plan otherwise.

        May be asked more than once for a step.
        """

    def learn(self, outcome: Outcome, length: int) -> None:
        """Told of every step as soon as it has been read.

        Args:
            length: tokens in the KV cache after it.
        """
