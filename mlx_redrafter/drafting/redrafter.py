"""The recurrent head: a small network that guesses what the target will say next.

Notation of the paper (arXiv 2403.09919, section 3.1) with the details of Apple's weights:

    s_0 = 0,   s_k = SiLU(W e(x_k) + U s_{k-1} + b)      (rnn; b sits on U)
               s_k = e(x_k) + s_{k-1}                    (no rnn)
    z = [h ; s_k];  z = P z + p   only if exit_dim != 2 * hidden_size, or h is of several layers
    z = z + SiLU(A_i z + a_i)     for i in 1..num_draft_layers
    z = RMSNorm(z)                only with output_norm
    logits = O z

e is the target's embedding, h the context: the target's last hidden state, or those behind
several of its layers side by side, the same for all steps of one beam. P is kept as its two
column halves, so that the half that reads h is computed once per step, and so that each half
can be quantised on its own. What prefix attention finds at the root, where there is any, is
added to the half that reads h.

O is most of what a draft step reads. A light head scores a reduced draft vocabulary, the
most frequent tokens only, or ties O to the target's own output layer and stores none.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.drafting.drafter_files import (
    HeadConfig,
    ScoringDrafter,
    read_draft_vocab_size,
    true_or_false,
    whole_number,
)
from mlx_redrafter.drafting.prefix_attention import PrefixAttention
from mlx_redrafter.drafting.shape import LONGEST_BEAM
from mlx_redrafter.errors import UserError

MODEL_TYPE = "recurrent_drafting_drafter"
R = TypeVar("R", bound="RecurrentDrafter")


@dataclasses.dataclass
class DrafterConfig(HeadConfig):
    """Shape of a drafter; the names are those of Apple's config.json.

    Args:
        vocab_size: tokens the head scores; equal to the target's.
        hidden_size: width of the target's hidden state, and of the recurrent state.
        exit_dim: width of the residual blocks.
        num_draft_layers: number of residual blocks, 0 or more.
        rnn: the gated recurrence, or (False) the sum of embeddings.
        draft_vocab_size: tokens that can be drafted, where not all; the tensor vocab_map
            then holds the target's id of each.
        context_layers: hidden states of the target that h is made of, by the number of layers passed,
            rising; the number of all layers stands for the last one, after the final norm. None of
            them: h is the last one alone, as in Apple's weights.
        prefix_window: rows of committed tokens that a row of prefix attention attends to; 0 where there is none.
        prefix_layers: layers of prefix attention; more than one need a window.
        output_norm: z is normalised before O, as targets do; no part of Apple's weights.
        tie_output: O is the target's own output layer, or those of its rows that can be
            drafted; needs exit_dim = hidden_size.
    """

    vocab_size: int
    hidden_size: int
    exit_dim: int
    num_draft_layers: int
    rnn: bool = True
    draft_vocab_size: int | None = None
    context_layers: tuple[int, ...] = ()
    prefix_window: int = 0
    prefix_layers: int = 1
    output_norm: bool = False
    tie_output: bool = False
    model_type = MODEL_TYPE
    said = "num_draft_layers", "rnn"  # as Apple's config.json says always

    @property
    def context_size(self) -> int:
        """The width of h."""
        return max(1, len(self.context_layers)) * self.hidden_size

    @property
    def has_input_proj(self) -> bool:
        own = len(self.context_layers) > 1 or self.prefix_window > 0
        return own or self.exit_dim != 2 * self.hidden_size

    @classmethod
    def from_dict(cls, fields: dict[str, Any], source: str) -> DrafterConfig:
        """Reads and checks the keys of a config.json; unknown ones are ignored.

        Raises:
            UserError: a missing key, or a value of the wrong type or range, and where it is: in `source`.
        """
        found = fields.get("model_type", MODEL_TYPE)
        if found != MODEL_TYPE:
            raise UserError(f"{source}: model_type is {found!r}, expected {MODEL_TYPE!r} (is this a drafter?)")
        if fields.get("emb_norm"):
            raise UserError(f"{source}: emb_norm is {fields['emb_norm']!r}; only drafters without it can be read")
        values: dict[str, Any] = {}
        for key, least in (("vocab_size", 1), ("hidden_size", 1), ("exit_dim", 1), ("num_draft_layers", 0)):
            values[key] = whole_number(fields, key, least, source)
        for key in ("rnn", "output_norm", "tie_output"):
            values[key] = true_or_false(fields, key, False, source)
        if values["tie_output"] and values["exit_dim"] != values["hidden_size"]:
            raise UserError(
                f"{source}: tie_output needs exit_dim = hidden_size, found {values['exit_dim']}"
                f" and {values['hidden_size']}"
            )
        values["draft_vocab_size"] = read_draft_vocab_size(fields, values["vocab_size"], source)
        if (layers := fields.get("context_layers")) is not None and not are_layers(layers):
            raise UserError(f"{source}: context_layers is {layers!r}, expected a list of rising numbers from 1 on")
        values["context_layers"] = tuple(layers or ())
        for key, usual, least in (("prefix_window", 0, 0), ("prefix_layers", 1, 1)):
            values[key] = whole_number({key: usual} | fields, key, least, source)
        if values["prefix_layers"] > 1 and not values["prefix_window"]:
            raise UserError(f"{source}: prefix_layers is {values['prefix_layers']}, which needs a prefix_window")
        return cls(**values).with_notes(fields, source)

    def widths(self) -> dict[str, int]:
        return {"hidden_size": self.hidden_size, "exit_dim": self.exit_dim}


def are_layers(value: Any) -> bool:
    """Whether this is a list of numbers of layers, each above the one before."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(n) is int for n in value)
        and all(a < b for a, b in zip([0, *value], value))
    )


class ResidualBlock(nn.Module):
    """z + SiLU(A z + a)."""

    def __init__(self, dims: int):
        super().__init__()
        self.linear = nn.Linear(dims, dims)

    def __call__(self, z: mx.array) -> mx.array:
        return z + nn.silu(self.linear(z))


class RecurrentDrafter(ScoringDrafter):
    """The drafter's weights and its three pieces: context half, recurrence, head."""

    method = "redrafter"
    deepest = LONGEST_BEAM - 1
    at_the_root = ("input_proj_context", "prefix.")  # how the names of weights begin that are read once per step
    unread = ("vocab_map", *at_the_root)

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.config = config
        hidden, exit_dim = config.hidden_size, config.exit_dim
        if config.rnn:
            self.rnn_w = nn.Linear(hidden, hidden, bias=False)
            self.rnn_u = nn.Linear(hidden, hidden)
        if config.has_input_proj:
            self.input_proj_context = nn.Linear(config.context_size, exit_dim)
            self.input_proj_state = nn.Linear(hidden, exit_dim, bias=False)
        if config.prefix_window:
            shape = config.prefix_window, config.prefix_layers
            self.prefix = PrefixAttention(config.context_size, hidden, exit_dim, *shape)
        self.blocks = [ResidualBlock(exit_dim) for _ in range(config.num_draft_layers)]
        if config.output_norm:
            self.output_norm = nn.RMSNorm(exit_dim, eps=1e-6)
        self.add_output_layer(exit_dim)

    @property
    def context_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.config.context_layers

    def fill(self: R, weights: dict[str, mx.array], source: str) -> R:
        """As any drafter's; of files written when prefix attention had one layer, under the name "layer", too."""
        old, new = "prefix.layer.", "prefix.layers.0."
        return super().fill({name.replace(old, new): value for name, value in weights.items()}, source)

    def project_context(self, context: mx.array) -> mx.array:
        """The part of the head that reads only the context h; once per step.

        Args:
            context: (..., context_size).

        Returns:
            P_h h + p of shape (..., exit_dim), or h itself where there is no projection; to this
            is added what prefix attention found.
        """
        return self.input_proj_context(context) if "input_proj_context" in self else context

    def advance(self, embedding: mx.array, state: mx.array | None) -> mx.array:
        """One step of the recurrence.

        Args:
            embedding: e(x_k), (..., hidden_size).
            state: s_{k-1} of the same shape; None stands for s_0 = 0.

        Returns:
            s_k, same shape.
        """
        if not self.config.rnn:
            return embedding if state is None else embedding + state
        carried = self.rnn_u.bias if state is None else self.rnn_u(state)
        return nn.silu(self.rnn_w(embedding) + carried)

    def logits(self, projected_context: mx.array, state: mx.array) -> mx.array:
        """Scores of the next draft token.

        Args:
            projected_context: from `project_context`, broadcastable against the state.
            state: s_k, (..., hidden_size).

        Returns:
            (..., config.scored), unnormalised.
        """
        return self.lm_head(self.features(projected_context, state))

    def features(self, projected_context: mx.array, state: mx.array) -> mx.array:
        """What O reads, (..., exit_dim); arguments as for `logits`."""
        if "input_proj_state" in self:
            z = projected_context + self.input_proj_state(state)
        else:
            shape = (*state.shape[:-1], projected_context.shape[-1])
            z = mx.concatenate([mx.broadcast_to(projected_context, shape), state], axis=-1)
        for block in self.blocks:
            z = block(z)
        if self.config.output_norm:
            z = self.output_norm(z)
        return z
