"""Trains recurrent drafters: at position t the head reads the hidden state h_t and the tokens x_{t+1} .. x_{t+k}.

(Paper, section 3.4.) Knows nothing of the loss.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from mlx_redrafter.drafting.drafter_files import check_widths
from mlx_redrafter.drafting.redrafter import DrafterConfig, RecurrentDrafter, are_layers
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.flag_types import flag
from mlx_redrafter.target.model import Target
from mlx_redrafter.training.batches import BatchMaker
from mlx_redrafter.training.drafters.base import Method, output_in_words, scorer
from mlx_redrafter.training.drafters.init_weights import FROM_TARGET, TIED, new_drafter
from mlx_redrafter.training.drafters.vocabulary import frequent_tokens
from mlx_redrafter.training.loss import Batch
from mlx_redrafter.training.teacher import Teacher
from mlx_redrafter.training.text.shards import Rows


class ReDrafter(Method):
    name = "redrafter"
    title = "A ReDrafter head"
    kind = RecurrentDrafter
    reads_tokens = True
    foreign = ("tree_size",)

    def check(self, args: argparse.Namespace) -> None:
        super().check(args)
        if args.context_layers is not None and not are_layers(args.context_layers):
            given = " ".join(map(str, args.context_layers))
            raise UserError(f"{flag('context_layers')} {given}: expected rising numbers of layers")
        if args.prefix_layers is not None and args.prefix_window is None and args.init is None:
            raise UserError("--prefix-layers needs --prefix-window")

    def check_for(self, args: argparse.Namespace, target: Target) -> None:
        target.check_layers(tuple(args.context_layers or ()), flag("context_layers"))
        exit_dim = args.exit_dim or target.hidden_size
        if args.output_layer == TIED and exit_dim != target.hidden_size:
            raise UserError(f"--output-layer tied needs --exit-dim {target.hidden_size}, the target's hidden size")
        if args.q_bits is not None:
            check_widths({"hidden_size": target.hidden_size, "exit_dim": exit_dim}, args.q_group_size)

    def shape_flags(self, drafter: RecurrentDrafter) -> dict[str, Any]:
        same = ("exit_dim", "num_draft_layers", "draft_vocab_size")
        config, found = drafter.config, {name: getattr(drafter.config, name) for name in same}
        window, deep = (config.prefix_window, config.prefix_layers) if config.prefix_window else (None, None)
        layers = list(drafter.context_layers) or None
        return found | {"context_layers": layers, "prefix_window": window, "prefix_layers": deep}

    def new(self, args: argparse.Namespace, target: Target, rows: Rows) -> RecurrentDrafter:
        layers = tuple(args.context_layers or ())
        config = DrafterConfig(
            target.vocab_size,
            target.hidden_size,
            args.exit_dim or target.hidden_size,
            2 if args.num_draft_layers is None else args.num_draft_layers,
            not args.no_rnn,
            draft_vocab_size=args.draft_vocab_size,
            context_layers=() if layers == (target.num_layers,) else layers,
            prefix_window=args.prefix_window or 0,
            prefix_layers=args.prefix_layers or 1,
            output_norm=args.output_norm,
            tie_output=args.output_layer == TIED,
        )
        vocab_map = None
        if args.draft_vocab_size is not None:
            vocab_map = frequent_tokens(rows, args.draft_vocab_size, target.vocab_size)
        return new_drafter(target, config, args.seed, args.output_layer or FROM_TARGET, vocab_map, rows[:1][0])

    def batches(self, drafter: RecurrentDrafter, teacher: Teacher, seed: int, dtype: mx.Dtype) -> BatchMaker:
        return BatchMaker(teacher, seed, dtype, whole=drafter.config.prefix_window > 0)

    def scores(self, drafter: RecurrentDrafter, batch: Batch) -> Iterator[mx.array]:
        context = drafter.project_context(batch.hidden)
        if batch.whole:
            contexts, after, at = batch.whole
            context = context + drafter.prefix(contexts, after).reshape(-1, context.shape[-1])[at]
        score, state = scorer(drafter.lm_head, batch), None
        for embedding in batch.embeddings:
            rows = embedding.shape[0]
            state = drafter.advance(embedding, None if state is None else state[:rows])
            yield score(drafter.features(context[:rows], state))

    def architecture(self, drafter: RecurrentDrafter, coverage: float) -> str:
        config = drafter.config
        output = output_in_words(config, coverage)
        recurrence = "rnn" if config.rnn else "sum of embeddings"
        blocks = f"{config.num_draft_layers} residual blocks"
        layers = f"context of layers {', '.join(map(str, config.context_layers))}, " if config.context_layers else ""
        if config.prefix_window:
            deep = f" of {config.prefix_layers} layers" if config.prefix_layers > 1 else ""
            layers += f"prefix attention{deep} over {config.prefix_window} tokens, "
        return f"{recurrence}, {layers}exit_dim {config.exit_dim}, {blocks}, output layer: {output}"
