"""What differs between the kinds of drafters that the same trainer trains."""

from __future__ import annotations

import abc
import argparse
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.model import Target
from mlx_redrafter.training.loss import Batch
from mlx_redrafter.training.teacher import Rows


class Method(abc.ABC):
    """A kind of drafters: how they begin, what they score, and what is said of them.

    Attributes:
        name: the value of --method.
        title: for the card, with the target's name after it.
        kind: the drafters' class.
        reads_tokens: whether a draft step reads the token before the one it guesses.
        foreign: flags, as argparse names them, that say nothing to drafters of this kind.
    """

    name: str
    title: str
    kind: type
    reads_tokens: bool
    foreign: tuple[str, ...]

    def check(self, args: argparse.Namespace) -> None:
        """What is wrong with the flags alone. Raises UserError."""
        for name in self.foreign:
            if getattr(args, name) not in (None, False):
                raise UserError(f"{flag(name)} says nothing to --method {self.name}")

    @abc.abstractmethod
    def check_for(self, args: argparse.Namespace, target: Target) -> None:
        """What is wrong with the flags for this target, before any work is done. Raises UserError."""

    @abc.abstractmethod
    def shape_flags(self, drafter: Any) -> dict[str, Any]:
        """The flags, by argparse's names, that a drafter's shape comes from, and their values for this one."""

    @abc.abstractmethod
    def new(self, args: argparse.Namespace, target: Target, rows: Rows) -> Any:
        """A drafter to start from, of the shape that the flags say."""

    @abc.abstractmethod
    def scores(self, drafter: Any, batch: Batch) -> Iterator[mx.array]:
        """What a drafter says at each draft step, for the loss.

        Yields:
            for step k, (n_k, scored) scores at the first n_k positions of the batch.
        """

    @abc.abstractmethod
    def quantize(self, drafter: Any, group_size: int, bits: int) -> None:
        """Quantises all matrices in place and notes it in the config."""

    @abc.abstractmethod
    def shape(self, args: argparse.Namespace) -> tuple[DraftShape, str]:
        """What is drafted where drafters are measured, 12 tokens at most, and the same in words."""

    @abc.abstractmethod
    def architecture(self, drafter: Any, coverage: float) -> str:
        """A drafter in a few words.

        Args:
            coverage: the share of held-out text that it can draft.
        """

    def settle(self, args: argparse.Namespace, drafter: Any, target: Target, rows: Rows) -> None:  # noqa: B027
        """Chooses what is not learned by gradients, once the weights are there."""

    def check_init(self, args: argparse.Namespace, drafter: Drafter) -> None:
        """Raises UserError unless a drafter can be gone on with as the flags say."""
        if drafter.config.quantization is not None:
            raise UserError(f"--init {args.init}: is quantised; training goes on from unquantised weights only")
        for name, has in self.shape_flags(drafter).items():
            value = getattr(args, name)
            if value is not None and value != has:
                raise UserError(f"{flag(name)} is {value}, but --init {args.init} has {has}")


def flag(name: str) -> str:
    """A flag as the user types it."""
    return f"--{name.replace('_', '-')}"
