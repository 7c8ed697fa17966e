"""Trains EAGLE-3 heads: whole texts are read, then each root's drafts from the head's own outputs.

(arXiv 2503.01840, section 3.1, "training-time test": step k's row at a root reads the output of step k - 1 there in
the context's place, and attends to the text's rows up to the root and to the rows of the steps between.) Knows nothing
of the loss.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_redrafter.drafting.cached.eagle import TAPS, EagleConfig, EagleHead
from mlx_redrafter.drafting.drafter_files import check_widths
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.flag_types import flag
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.operations import positions_per_row
from mlx_redrafter.target.output_layer import output_matrix
from mlx_redrafter.training.batches import BatchMaker
from mlx_redrafter.training.drafters.base import Method, output_in_words, scorer
from mlx_redrafter.training.drafters.init_weights import FROM_TARGET, RANDOM, TIED, hidden_rms
from mlx_redrafter.training.drafters.vocabulary import frequent_tokens
from mlx_redrafter.training.loss import Batch
from mlx_redrafter.training.teacher import Teacher
from mlx_redrafter.training.text.shards import Rows

_HEAD_DIM = 64


class Eagle(Method):
    name = "eagle"
    title = "An EAGLE-3 head"
    kind = EagleHead
    reads_tokens = True
    foreign = (
        *("exit_dim", "num_draft_layers", "no_rnn", "prefix_window", "prefix_layers", "output_norm"),
        "tree_size",
    )

    def check(self, args: argparse.Namespace) -> None:
        super().check(args)
        layers = args.context_layers
        if layers is not None and (len(layers) != TAPS or sorted(layers) != layers):
            raise UserError(
                f"{flag('context_layers')} {' '.join(map(str, layers))}: expected {TAPS} rising numbers of layers"
            )

    def check_for(self, args: argparse.Namespace, target: Target) -> None:
        target.check_layers(_layers(args, target), f"--method {self.name}")
        if args.q_bits is not None:
            check_widths(_config(args, target).widths(), args.q_group_size)

    def shape_flags(self, drafter: EagleHead) -> dict[str, Any]:
        found = {"context_layers": list(drafter.context_layers), "draft_vocab_size": drafter.config.draft_vocab_size}
        return found | ({"output_layer": TIED} if drafter.config.tie_output else {})

    def new(self, args: argparse.Namespace, target: Target, rows: Rows) -> EagleHead:
        """A head to start from: unless --output-layer is random, near the target's own scores.

        The last hidden state, where it is among those that are read, passes through to the output layer, which begins
        as the target's; attention and MLP add nothing yet.
        """
        mx.random.seed(args.seed)
        config = _config(args, target)
        head = EagleHead(config)
        if config.draft_vocab_size is not None:
            head.vocab_map = mx.array(frequent_tokens(rows, config.draft_vocab_size, target.vocab_size))
        check_pair(target, head)
        if args.output_layer in (None, FROM_TARGET):
            matrix = mx.array(output_matrix(target))
            head.lm_head.weight = matrix if config.draft_vocab_size is None else matrix[head.vocab_map]
        if args.output_layer != RANDOM:
            for linear in (head.layer.self_attn.o_proj, head.layer.mlp.down_proj):
                linear.weight = mx.zeros_like(linear.weight)
            head.norm.weight = hidden_rms(target, rows[:1][0]) * mx.ones_like(head.norm.weight)
            if config.context_layers[-1] == target.num_layers:
                passed = np.eye(config.hidden_size, dtype=np.float32)
                head.fc.weight = mx.array(np.pad(passed, [(0, 0), (2 * config.hidden_size, 0)]))
        mx.eval(head.parameters())
        return head

    def earlier(self, args: argparse.Namespace, target: Target, tokenizer: Any) -> EagleHead:
        head: EagleHead = super().earlier(args, target, tokenizer)
        if head.config.own_embedding:
            raise UserError(f"--init {args.init}: has an embedding of its own; only heads that read the target's learn")
        return head

    def batches(self, drafter: EagleHead, teacher: Teacher, seed: int, dtype: mx.Dtype) -> BatchMaker:
        return BatchMaker(teacher, seed, dtype, whole=True)

    def scores(self, drafter: EagleHead, batch: Batch) -> Iterator[mx.array]:
        contexts, after, at = batch.whole
        texts, length, _ = contexts.shape
        score, cache = scorer(drafter.lm_head, batch), _Unrolled()
        text = drafter.layer(after, drafter.fc(contexts), "causal", cache)
        # Positions come rank by rank over all texts; the layer reads them text by text.
        roots = at.reshape(-1, texts).T % length
        hidden = text.reshape(-1, text.shape[-1])[at].reshape(-1, texts, text.shape[-1]).swapaxes(0, 1)
        for k, embedding in enumerate(batch.embeddings):
            if k:
                count = embedding.shape[0] // texts
                rows = embedding.reshape(count, texts, -1).swapaxes(0, 1)
                hidden = cache.read(drafter, rows, hidden[:, :count], roots[:, :count], k)
            yield score(drafter.features(hidden.swapaxes(0, 1).reshape(-1, hidden.shape[-1])))

    def architecture(self, drafter: EagleHead, coverage: float) -> str:
        config, layers = drafter.config, ", ".join(map(str, drafter.context_layers))
        size = f"one layer of {config.layer['hidden_size']} x {config.layer['intermediate_size']}"
        return f"EAGLE-3, context of layers {layers}, {size}, output layer: {output_in_words(config, coverage)}"


class _Unrolled:
    """Keys and values of whole texts, and of the steps behind their roots; looks to the layer like an mlx-lm cache.

    Attributes:
        offset: 0 for the texts; (B, r) positions of the rows of a step.
    """

    def __init__(self) -> None:
        self.offset: Any = 0
        self._keys: list[mx.array] = []
        self._values: list[mx.array] = []

    def read(self, head: EagleHead, embeddings: mx.array, outputs: mx.array, roots: mx.array, k: int) -> mx.array:
        """The outputs of the rows that stand k places behind their roots, (B, r, width).

        Args:
            embeddings, outputs: (B, r, width) of the row's token, and of the row before it.
            roots: (B, r) rows of the texts.
        """
        batch, count = roots.shape
        text, *steps = (keys.shape[2] for keys in self._keys)
        seen = [mx.arange(text) <= roots[..., None]]
        own = [mx.arange(count)[:, None] == mx.arange(rows) for rows in (*steps, count)]
        mask = mx.concatenate([*seen, *(mx.broadcast_to(o, (batch, *o.shape)) for o in own)], axis=-1)[:, None]
        self.offset = roots + k
        with positions_per_row():
            hidden: mx.array = head.layer(embeddings, outputs, mask, self)
        return hidden

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self._keys.append(keys)
        self._values.append(values)
        return mx.concatenate(self._keys, axis=2), mx.concatenate(self._values, axis=2)


def _layers(args: argparse.Namespace, target: Target) -> tuple[int, ...]:
    """Low, middle, high: a quarter, a half and all of a target's layers, unless the flags say others."""
    count = target.num_layers
    return tuple(args.context_layers or (max(1, round(count / 4)), max(1, round(count / 2)), count))


def _config(args: argparse.Namespace, target: Target) -> EagleConfig:
    size = target.hidden_size
    layer = {
        "hidden_size": size,
        "intermediate_size": 2 * size,
        "num_attention_heads": size // _HEAD_DIM if size % _HEAD_DIM == 0 else 1,
        "rms_norm_eps": 1e-6,
    }
    return EagleConfig(
        target.vocab_size,
        size,
        layer,
        draft_vocab_size=args.draft_vocab_size,
        context_layers=_layers(args, target),
        unit_contexts=True,
        tie_output=args.output_layer == TIED,
    )
