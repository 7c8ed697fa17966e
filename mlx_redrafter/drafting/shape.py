"""Says how much is drafted per step.

Knows nothing of drafters.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

from mlx_redrafter.errors import UserError

AUTO, ON, OFF = "auto", "on", "off"
LOOKUPS = (AUTO, ON, OFF)
BEAMS, BEST_FIRST = "beams", "best-first"
POLICIES = (BEST_FIRST, BEAMS)
LONGEST_BEAM = 32  # tokens, the root included


@dataclasses.dataclass(frozen=True)
class DraftShape:
    """How much is drafted per step, where that is fixed.

    The default is a chain of three: four rows cost little more than one on most devices.
    A tree of more nodes is accepted further and pays where rows are cheap, or the target
    is large beside its drafter. Left to itself ("auto"), decoding measures both and chooses.

    Args:
        beam_width: W beams; of Medusa heads, the candidates of each.
        beam_length: L tokens per beam, the root included.
        num_draft_tokens: N nodes that the target checks per step, the root not counted.
        tree_policy: which nodes: "best-first" or "beams".
    """

    beam_width: int = 1
    beam_length: int = 4
    num_draft_tokens: int = 3
    tree_policy: str = BEST_FIRST

    def __str__(self) -> str:
        if self.beam_width == 1:
            return f"chain of {self.as_chain().num_draft_tokens}"
        policy = "" if self.tree_policy == BEST_FIRST else f", {self.tree_policy}"
        return f"tree of {self.num_draft_tokens} ({self.beam_width} x {self.beam_length}{policy})"

    def as_chain(self) -> DraftShape:
        """The longest chain that verifies no more nodes."""
        length = min(self.beam_length, self.num_draft_tokens + 1)
        return DraftShape(1, length, length - 1, self.tree_policy)

    def check(self, vocab_size: int) -> None:
        """Raises UserError for a value out of range, naming its flag."""
        if not 1 <= self.beam_width <= min(64, vocab_size):
            raise UserError(f"--beam-width is {self.beam_width}, expected 1 to {min(64, vocab_size)}")
        if not 2 <= self.beam_length <= LONGEST_BEAM:
            raise UserError(
                f"--beam-length is {self.beam_length}, expected 2 to {LONGEST_BEAM} (the root counts as one)"
            )
        most = self.beam_width * (self.beam_length - 1)
        if not 1 <= self.num_draft_tokens <= most:
            raise UserError(
                f"--num-draft-tokens is {self.num_draft_tokens}, expected 1 to {most}"
                f" = beam width {self.beam_width} x (beam length {self.beam_length} - 1)"
            )
        if self.tree_policy not in POLICIES:
            raise UserError(f"--tree-policy is {self.tree_policy!r}, expected one of {', '.join(POLICIES)}")


@dataclasses.dataclass(frozen=True)
class Plain:
    """The step drafts nothing: it is plain decoding."""

    num_draft_tokens = 0

    def __str__(self) -> str:
        return "plain"


@dataclasses.dataclass(frozen=True)
class Drafted:
    """The drafter drafts.

    Args:
        shape: how much.
        with_lookup: what lookup finds joins the tree, or takes the place of a chain.
    """

    shape: DraftShape
    with_lookup: bool = False

    @property
    def num_draft_tokens(self) -> int:
        return self.shape.num_draft_tokens

    def __str__(self) -> str:
        return f"{self.shape}{' with lookup' if self.with_lookup else ''}"


@dataclasses.dataclass(frozen=True)
class LookedUp:
    """A chain of what followed in the text so far, and nothing of the drafter's."""

    num_draft_tokens: int

    def __str__(self) -> str:
        return f"lookup of {self.num_draft_tokens}"


@dataclasses.dataclass(frozen=True)
class Forced:
    """A chain of what a grammar forces; nobody drafts."""

    num_draft_tokens: int

    def __str__(self) -> str:
        return f"grammar's {self.num_draft_tokens}"


Plan: TypeAlias = Plain | Drafted | LookedUp | Forced  # what one step drafts
PLAIN = Plain()
