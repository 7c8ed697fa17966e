"""The interface between the trainer and a kind of drafter.

Knows nothing of a kind's layers.
"""

from __future__ import annotations

import abc
import argparse
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.device import on_cpu
from mlx_redrafter.system.flag_types import flag
from mlx_redrafter.target.fingerprint import fingerprint
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.output_layer import rows_of
from mlx_redrafter.text.loading import find_drafter
from mlx_redrafter.training.acceptance_length import acceptance_length
from mlx_redrafter.training.batches import BatchMaker, WholeRows
from mlx_redrafter.training.loss import Batch
from mlx_redrafter.training.teacher import Teacher
from mlx_redrafter.training.text.shards import Rows


class Method(abc.ABC):
    """A kind of drafters: how they begin, what they score, how they are kept and described.

    Heads, which read the target's hidden states, need only the abstract methods.

    Attributes:
        name: the value of --method.
        title: for the card, with the target's name after it.
        kind: the drafters' class.
        reads_tokens: whether a draft step reads the token before the one it guesses.
        foreign: flags, as argparse names them, that do not apply to drafters of this kind.
        use: how text is written with one, for the card.
    """

    name: str
    title: str
    kind: Any
    reads_tokens: bool
    foreign: tuple[str, ...]
    use = 'mlx-redrafter generate --model {model} --draft THIS_DIRECTORY -p "..."'

    def check(self, args: argparse.Namespace) -> None:
        """Raises UserError for what is wrong with the flags alone."""
        for name in self.foreign:
            if getattr(args, name) not in (None, False):
                raise UserError(f"{flag(name)} does not apply to --method {self.name}")

    def check_for(self, args: argparse.Namespace, target: Target) -> None:  # noqa: B027
        """Raises UserError for flags that do not fit this target, before any work is done."""

    def steps(self, args: argparse.Namespace) -> int:
        """Draft steps that are learned."""
        return int(args.beam_length) - 1

    def shape_flags(self, drafter: Any) -> dict[str, Any]:
        """The flags, by argparse's names, that a drafter's shape comes from, and their values for this one."""
        return {}

    @abc.abstractmethod
    def new(self, args: argparse.Namespace, target: Target, rows: Rows) -> Any:
        """A drafter to start from, of the shape that the flags say."""

    def earlier(self, args: argparse.Namespace, target: Target, tokenizer: Any) -> Any:
        """The drafter that --init names, in float32. Raises UserError unless training can go on from it."""
        drafter: Any = open_drafter(find_drafter(args.init, "--init"))
        if not isinstance(drafter, self.kind):
            raise UserError(f"--init {args.init}: is a drafter of another kind than --method {self.name}")
        if drafter.config.quantization is not None:
            raise UserError(f"--init {args.init}: is quantised; training goes on from unquantised weights only")
        for name, has in self.shape_flags(drafter).items():
            value = getattr(args, name)
            if value is not None and value != has:
                raise UserError(f"{flag(name)} is {value}, but --init {args.init} has {has}")
        check_pair(target, drafter, f"--init {args.init}")
        drafter.set_dtype(mx.float32)
        return drafter

    def batches(self, drafter: Any, teacher: Teacher, seed: int, dtype: mx.Dtype) -> BatchMaker | WholeRows:
        """What cuts the batches for a drafter of this kind."""
        return BatchMaker(teacher, seed, dtype, self.reads_tokens)

    @abc.abstractmethod
    def scores(self, drafter: Any, batch: Batch) -> Iterator[mx.array]:
        """For each draft step k, the drafter's scores (n_k, scored) at the first n_k positions of the batch."""

    def settle(self, args: argparse.Namespace, drafter: Any, target: Target, rows: Rows) -> None:  # noqa: B027
        """Chooses what is not learned by gradients, once the weights are there."""

    def shape(self, args: argparse.Namespace) -> tuple[DraftShape, str]:
        """What is drafted where drafters are measured, 12 tokens at most, and the same in words."""
        shape = DraftShape(4, args.beam_length, min(12, 4 * (args.beam_length - 1)))
        return shape, f"W = 4, L = {args.beam_length}, {shape.num_draft_tokens} draft tokens, best-first"

    def acceptance(
        self, args: argparse.Namespace, drafter: Any, target: Target, prompts: list[list[int]], tokens: int
    ) -> float:
        """Mean acceptance length of greedy decoding, `tokens` for each prompt."""
        return acceptance_length(target, drafter, prompts, self.shape(args)[0], tokens)

    def save(self, args: argparse.Namespace, drafter: Any, target: Target, tokenizer: Any, out: pathlib.Path) -> None:
        """Writes a finished drafter, in the type and the bits that the flags say."""
        drafter.config.target_fingerprint = fingerprint(target, tokenizer, args.model)
        drafter.set_dtype(getattr(mx, args.dtype))
        if args.q_bits is not None:
            drafter.quantize(args.q_group_size, args.q_bits)
        drafter.save(out)

    def open(self, out: pathlib.Path, target: Target) -> tuple[Any, int]:
        """The finished drafter as it will be used, and the bytes that a draft step reads of it as stored."""
        drafter: Any = open_drafter(out)
        check_pair(target, drafter)
        read = drafter.bytes_per_draft_step()
        if on_cpu() and drafter.config.quantization is None:
            drafter.set_dtype(mx.float32)
        return drafter, read

    @abc.abstractmethod
    def architecture(self, drafter: Any, coverage: float) -> str:
        """A drafter in a few words; `coverage` is the share of held-out text that it can draft."""


def scorer(output: Any, batch: Batch) -> Callable[[mx.array], mx.array]:
    """What turns features into scores: an output layer, or those of its rows that the batch asks for."""
    if not batch.candidates:
        return output  # type: ignore[no-any-return]
    rows = rows_of(output, batch.candidates[0])
    return lambda features: features @ rows.T


def output_in_words(config: Any, coverage: float) -> str:
    """The output layer of a `ScoringDrafter`; `coverage` as for `Method.architecture`."""
    output = "the target's own (tied)" if config.tie_output else f"{config.scored:,} rows"
    if config.draft_vocab_size:
        output += f", the {config.draft_vocab_size:,} most frequent of {config.vocab_size:,} tokens"
        output += f" ({coverage:.1%} of held-out text)"
    return output
