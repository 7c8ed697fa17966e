"""Trains a small mlx-lm model as a target's draft model, a peer of the heads with the same text and time.

It learns the target's distribution at every position; mlx_lm itself drafts with it. Knows nothing of heads.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import speculative_generate_step
from mlx_lm.utils import save_config, save_model

from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.device import on_cpu
from mlx_redrafter.system.files import read_json
from mlx_redrafter.system.hub import fetch
from mlx_redrafter.system.weights import weights
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.loading import load_target
from mlx_redrafter.training.batches import WholeRows
from mlx_redrafter.training.drafters.base import Method
from mlx_redrafter.training.loss import Batch
from mlx_redrafter.training.teacher import Teacher
from mlx_redrafter.training.text.rendering import Renderer
from mlx_redrafter.training.text.shards import Rows


class DraftModel(Method):
    name = "draft-model"
    title = "A draft model"
    kind = nn.Module
    reads_tokens = True
    foreign = (
        *("exit_dim", "num_draft_layers", "no_rnn", "draft_vocab_size", "output_layer", "tree_size", "q_bits"),
        *("q_aware", "step_weights", "step_shares", "context_layers", "prefix_window", "prefix_layers"),
        *("output_norm", "loss_vocab", "learn_prompts", "dropout", "expected"),
    )
    use = 'mlx_lm.generate --model {model} --draft-model THIS_DIRECTORY --prompt "..."'

    def check(self, args: argparse.Namespace) -> None:
        super().check(args)
        if args.init is None:
            raise UserError("--method draft-model needs --init, an mlx-lm model with the target's tokenizer")

    def steps(self, args: argparse.Namespace) -> int:
        return 1  # the same at every position

    def new(self, args: argparse.Namespace, target: Target, rows: Rows) -> nn.Module:
        raise NotImplementedError("a draft model begins from --init")

    def earlier(self, args: argparse.Namespace, target: Target, tokenizer: Any) -> nn.Module:
        model, own = load_target(fetch(args.init, "--init"), None, "float32", None, args.trust_remote_code)
        vocabulary = Target.of(model).vocab_size
        if vocabulary != target.vocab_size:
            raise UserError(f"--init {args.init}: vocabulary of {vocabulary}, the target's is {target.vocab_size}")
        if Renderer(own).fingerprint() != Renderer(tokenizer).fingerprint():
            raise UserError(f"--init {args.init}: its tokenizer is another than the target's")
        if any(name.endswith(".scales") for name in dict(tree_flatten(model.parameters()))):
            raise UserError(f"--init {args.init}: is quantised; training goes on from unquantised weights only")
        return model

    def batches(self, drafter: Any, teacher: Teacher, seed: int, dtype: mx.Dtype) -> WholeRows:
        return WholeRows(teacher)

    def scores(self, drafter: nn.Module, batch: Batch) -> Iterator[mx.array]:
        logits = drafter(batch.tokens[0])
        yield logits.reshape(-1, logits.shape[-1])

    def shape(self, args: argparse.Namespace) -> tuple[DraftShape, str]:
        nodes = min(12, args.beam_length - 1)
        return DraftShape(1, nodes + 1, nodes), f"by mlx_lm, {nodes} draft tokens"

    def acceptance(
        self, args: argparse.Namespace, drafter: nn.Module, target: Target, prompts: list[list[int]], tokens: int
    ) -> float:
        steps, nodes = 0, self.shape(args)[0].num_draft_tokens
        for prompt in prompts:
            drafted = [
                from_draft
                for _, _, from_draft in speculative_generate_step(
                    mx.array(prompt), target.model, drafter, num_draft_tokens=nodes, max_tokens=tokens
                )
            ]
            steps += len(drafted) - sum(drafted) + drafted[-1]  # the last step may be cut short
        return len(prompts) * tokens / steps

    def save(
        self, args: argparse.Namespace, drafter: nn.Module, target: Target, tokenizer: Any, out: pathlib.Path
    ) -> None:
        source = fetch(args.init, "--init")
        drafter.set_dtype(getattr(mx, args.dtype))
        try:
            with tempfile.TemporaryDirectory(dir=out / "training") as scratch:
                folder = pathlib.Path(scratch)
                tokenizer.save_pretrained(folder)
                save_config(read_json(source / "config.json") | {"torch_dtype": args.dtype}, folder / "config.json")
                save_model(folder, drafter)
                for file in sorted(folder.iterdir(), key=lambda file: file.name.startswith("model")):  # weights last
                    os.replace(file, out / file.name)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{out}: cannot be written ({error})") from error

    def open(self, out: pathlib.Path, target: Target) -> tuple[nn.Module, int]:
        model, _ = load_target(out)
        read = weights(model)[1]
        if on_cpu():
            model.set_dtype(mx.float32)
        return model, read

    def architecture(self, drafter: nn.Module, coverage: float) -> str:
        return f"{getattr(drafter, 'model_type', 'an mlx-lm model')}, {len(drafter.layers)} layers, for mlx_lm"
