"""Trains Medusa heads: at position t head k guesses the target's token after x_{t+k+1} from the hidden state h_t.

The recurrent head's step k guesses the same token. Knows nothing of the loss.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from mlx_redrafter.drafting.drafter_files import check_widths
from mlx_redrafter.drafting.medusa import MedusaConfig, MedusaHeads
from mlx_redrafter.drafting.medusa_tree import PUBLISHED, RANKS, fit_choices, rank_accuracies
from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.output_layer import output_matrix
from mlx_redrafter.training.drafters.base import Method
from mlx_redrafter.training.drafters.init_weights import FROM_TARGET, TIED
from mlx_redrafter.training.loss import Batch
from mlx_redrafter.training.text.shards import Rows


class Medusa(Method):
    name = "medusa"
    title = "Medusa heads"
    kind = MedusaHeads
    reads_tokens = False
    foreign = (
        *("exit_dim", "no_rnn", "context_layers", "prefix_window", "prefix_layers", "output_norm"),
        *("draft_vocab_size", "loss_vocab"),
    )

    def check(self, args: argparse.Namespace) -> None:
        super().check(args)
        if args.output_layer == TIED:  # their files have an output layer per head
            raise UserError("--output-layer is tied, which --method medusa cannot be; expected target or random")

    def check_for(self, args: argparse.Namespace, target: Target) -> None:
        if args.q_bits is not None:
            check_widths({"hidden_size": target.hidden_size}, args.q_group_size)

    def shape_flags(self, drafter: MedusaHeads) -> dict[str, Any]:
        config = drafter.config
        return {"num_draft_layers": config.medusa_num_layers, "beam_length": config.medusa_num_heads + 1}

    def new(self, args: argparse.Namespace, target: Target, rows: Rows) -> MedusaHeads:
        """Heads to start from.

        By default each output layer starts as the target's and the blocks add nothing yet
        (Medusa, arXiv 2401.10774, section 2.1.1); with --output-layer random all of it is random.
        """
        mx.random.seed(args.seed)
        layers = 1 if args.num_draft_layers is None else args.num_draft_layers
        heads = MedusaHeads(MedusaConfig(target.vocab_size, target.hidden_size, args.beam_length - 1, layers))
        if args.output_layer in (None, FROM_TARGET):
            matrix = mx.array(output_matrix(target))
            for head in heads.heads:
                head.lm_head.weight = mx.array(matrix)
                for block in head.blocks:
                    block.linear.weight = mx.zeros_like(block.linear.weight)
                    block.linear.bias = mx.zeros_like(block.linear.bias)
        mx.eval(heads.parameters())
        return heads

    def scores(self, drafter: MedusaHeads, batch: Batch) -> Iterator[mx.array]:
        for head, weights in zip(drafter.heads, batch.weights, strict=True):
            yield head(batch.hidden[: weights.shape[0]])

    def settle(self, args: argparse.Namespace, drafter: MedusaHeads, target: Target, rows: Rows) -> None:
        """Fits the static tree to the held-out rows."""
        tokens, counts = rows[len(rows) - rows.held_out :]
        accuracies = rank_accuracies(target, drafter, tokens.tolist(), counted=counts)
        drafter.config.medusa_choices = fit_choices(accuracies, args.tree_size or len(PUBLISHED))

    def shape(self, args: argparse.Namespace) -> tuple[DraftShape, str]:
        nodes = min(12, args.tree_size or len(PUBLISHED))
        return DraftShape(RANKS, args.beam_length, nodes), f"static tree of {nodes} draft tokens"

    def architecture(self, drafter: MedusaHeads, coverage: float) -> str:
        config = drafter.config
        return (
            f"Medusa, {config.medusa_num_heads} heads of {config.medusa_num_layers} residual blocks and an output"
            f" layer of {config.vocab_size:,} rows; static tree of {len(config.medusa_choices)} nodes, fitted to the"
            " held-out rows"
        )
