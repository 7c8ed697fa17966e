"""Loads what is compared: the target, at a scale of its cost, its drafter, and the facts about them.

Knows nothing of what is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import mlx.nn as nn
from mlx_redrafter.benchmarks.competitors import Decoder
from mlx_redrafter.benchmarks.cost_scale import scale_cost
from mlx_redrafter.benchmarks.prompts import Prompt, token_ids
from mlx_redrafter.benchmarks.report import check_out, command_line

from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.device import device_facts
from mlx_redrafter.system.openblas_layout import pack, panels_are_faster
from mlx_redrafter.system.ranks import number_of_ranks
from mlx_redrafter.system.weights import describe
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.flags import load_from
from mlx_redrafter.text.loading import is_embedded


@dataclasses.dataclass
class Loaded:
    """A target and how to say what was measured.

    Attributes:
        facts: device, versions, target and so on, by name.
        command: what was typed.
        cost_scale: bytes of weights per token, relative to the target as it was loaded.
        as_loaded: the same target as mlx_lm itself loads it; `model`, unless its weights were packed.
    """

    model: nn.Module
    tokenizer: Any
    facts: dict[str, str]
    command: str
    cost_scale: float
    as_loaded: nn.Module

    def decoder(self, drafter: Drafter | None, max_tokens: int, temp: float = 0.0, seed: int = 0) -> Decoder:
        return Decoder(self.model, self.tokenizer, drafter, max_tokens, temp, seed, self.as_loaded)


@dataclasses.dataclass
class Pair(Loaded):
    """A target with its drafter."""

    drafter: Drafter

    def check_shapes(self, shapes: Any) -> None:
        """Raises UserError for a shape of drafts that the drafter's vocabulary is too small for."""
        for shape in shapes:
            shape.check(self.drafter.config.vocab_size)


def load_pair(args: argparse.Namespace, baseline: bool = True) -> Pair:
    """The models that the flags name, the target's cost scaled.

    Args:
        baseline: hold the target as mlx_lm loads it, too, where that differs; without, memory is
            that of one target, and every method runs it.
    """
    check_out(args.out)
    model, drafter, tokenizer = load_from(args, pack_weights=False)
    if drafter is None:
        raise UserError(
            "--draft is missing: a benchmark compares a target with and without its drafter; `mlx-redrafter train`"
            " makes one, and a small model drafts, too"
        )
    pack(drafter)
    loaded = _loaded(args, model, tokenizer, args.cost_scale, baseline)
    loaded.facts["drafter"] = f"{args.draft or args.model}, {describe(drafter)}"
    return Pair(**vars(loaded), drafter=drafter)


def load_scaled(args: argparse.Namespace, scale: float) -> Loaded:
    """The target alone, at a scale of its cost."""
    model, _, tokenizer = load_from(args, pack_weights=False)
    return _loaded(args, model, tokenizer, scale, baseline=True)


def _loaded(args: argparse.Namespace, model: nn.Module, tokenizer: Any, scale: float, baseline: bool) -> Loaded:
    reached = scale_cost(model, scale)
    as_loaded, layout = model, "as loaded"
    if panels_are_faster() and number_of_ranks() == 1:
        layout = "packed for OpenBLAS"
        if baseline:
            as_loaded, _, _ = load_from(args, pack_weights=False)
            scale_cost(as_loaded, scale)
            layout += ", but for as-loaded"
        pack(model)
    facts = device_facts()
    facts["weights"] = layout
    scaled = f" (cost scaled {reached:.2f}x)" if scale > 1 else ""
    facts["target"] = f"{args.model}, {describe(model)}{scaled}"
    return Loaded(model, tokenizer, facts, command_line(args, args.parser), reached, as_loaded)


def encode_texts(args: argparse.Namespace, loaded: Loaded, prompts: list[Prompt]) -> list[list[int]]:
    """The prompts' token ids, and a note in the facts what they are. See `encode_prompts`."""
    encoded = encode_prompts(args, loaded.model, loaded.tokenizer, prompts)
    kinds = ", ".join(sorted({prompt.category for prompt in prompts}))
    shortest, longest = min(map(len, encoded)), max(map(len, encoded))
    loaded.facts["texts"] = (
        f"{len(encoded)} prompts ({kinds}) of {shortest} to {longest} tokens, {args.max_tokens} more each"
    )
    return encoded


def encode_prompts(
    args: argparse.Namespace, model: nn.Module, tokenizer: Any, prompts: list[Prompt]
) -> list[list[int]]:
    """The prompts' token ids. Raises UserError for one that does not fit into the target's context."""
    template = not is_embedded(args.model) and not args.ignore_chat_template
    encoded = [token_ids(prompt, tokenizer, args.prompt_tokens, template) for prompt in prompts]
    target = Target.of(model)
    if target.ranks is not None:  # mlx_lm's loop goes by them, too
        encoded = target.ranks.share(encoded)
    longest, limit = max(map(len, encoded)), target.context_length
    if limit is not None and longest + args.max_tokens > limit:
        raise UserError(
            f"--prompts: one has {longest} tokens, which with --max-tokens {args.max_tokens} exceeds the target's"
            f" context of {limit}; --prompt-tokens cuts prompts"
        )
    return encoded
