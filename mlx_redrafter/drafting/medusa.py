"""Medusa heads: each guesses a token further ahead from the same hidden state.

    z = h;  z = z + SiLU(W_i z + b_i)  for i in 1..medusa_num_layers;  logits = O z

h is the target's last hidden state, which chose the root; head k = 0, 1, ... scores the
token k + 1 places after the root (Medusa, arXiv 2401.10774, section 2.1.1).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.drafting.drafter_files import DrafterBase, HeadConfig, whole_number
from mlx_redrafter.drafting.medusa_tree import PUBLISHED, Choice, check_choices
from mlx_redrafter.drafting.redrafter import ResidualBlock
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.weights import tensors

MODEL_TYPE = "medusa"
MOST_HEADS = 31  # as many tokens as a beam can have after its root


@dataclasses.dataclass
class MedusaConfig(HeadConfig):
    """Shape of a set of heads; the names are those of Medusa's config.json where it has them.

    Args:
        vocab_size, hidden_size: of the target.
        medusa_num_heads: tokens ahead that there are heads for.
        medusa_num_layers: residual blocks of each head, 0 or more.
        medusa_choices: the static tree, most useful nodes first; the published one, as far as
            there are heads for it, if the file does not say.
    """

    vocab_size: int
    hidden_size: int
    medusa_num_heads: int
    medusa_num_layers: int = 1
    medusa_choices: tuple[Choice, ...] = ()
    model_type = MODEL_TYPE
    said = ("medusa_num_layers",)

    def __post_init__(self) -> None:
        if not self.medusa_choices:
            self.medusa_choices = tuple(c for c in PUBLISHED if len(c) <= self.medusa_num_heads)

    @classmethod
    def from_dict(cls, fields: dict[str, Any], source: str) -> MedusaConfig:
        """Reads and checks the keys of a config.json; unknown ones are ignored.

        Raises:
            UserError: a missing key, or a value of the wrong type or range, and where it is: in `source`.
        """
        vocab, hidden = (whole_number(fields, key, 1, source) for key in ("vocab_size", "hidden_size"))
        heads = whole_number(fields, "medusa_num_heads", 1, source)
        if heads > MOST_HEADS:
            raise UserError(f"{source}: medusa_num_heads is {heads}, expected 1 to {MOST_HEADS}")
        layers = whole_number({"medusa_num_layers": 1} | fields, "medusa_num_layers", 0, source)
        choices: tuple[Choice, ...] = ()
        if fields.get("medusa_choices") is not None:
            choices = check_choices(fields["medusa_choices"], heads, source)
        return cls(vocab, hidden, heads, layers, choices).with_notes(fields, source)

    def widths(self) -> dict[str, int]:
        return {"hidden_size": self.hidden_size}


class MedusaHead(nn.Module):
    """One head: residual blocks and an output layer of its own."""

    def __init__(self, config: MedusaConfig):
        super().__init__()
        self.blocks = [ResidualBlock(config.hidden_size) for _ in range(config.medusa_num_layers)]
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, context: mx.array) -> mx.array:
        for block in self.blocks:
            context = block(context)
        return self.lm_head(context)


class MedusaHeads(DrafterBase):
    """All heads over one context."""

    method = "medusa"

    def __init__(self, config: MedusaConfig):
        super().__init__()
        self.config, self.deepest = config, config.medusa_num_heads
        self.heads = [MedusaHead(config) for _ in range(config.medusa_num_heads)]

    def __call__(self, context: mx.array, count: int | None = None) -> mx.array:
        """Scores of the tokens after the root.

        Args:
            context: (..., hidden_size).
            count: the first so many heads; all if left out.

        Returns:
            (..., count, vocab_size), unnormalised.
        """
        return mx.stack([head(context) for head in self.heads[:count]], axis=-2)

    def bytes_per_draft_step(self) -> int:
        """Bytes of weights that drafting reads: all heads, once per step of decoding."""
        return sum(value.nbytes for value in tensors(self).values())
