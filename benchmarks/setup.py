"""What every benchmark needs: the pair of models, prompts, and the facts about them, from common flags."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

import mlx.nn as nn
from mlx_redrafter.benchmarks.cost_scaled import check_scale, scale_cost
from mlx_redrafter.benchmarks.methods import Decoder
from mlx_redrafter.benchmarks.prompts import Prompt, evenly, read_prompts, token_ids
from mlx_redrafter.benchmarks.report import check_out, command_line

from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.embedded.corpus import held_out_prefixes
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.device import device_facts
from mlx_redrafter.system.openblas_layout import pack, panels_are_faster
from mlx_redrafter.system.weights import describe
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.flags import add_pair_arguments, load_from

SCALE = (
    "widen the target's feed-forward layers by neurons that contribute nothing, until a token reads X times the"
    " weights: same text, higher cost"
)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The pair, the scale of its cost, and where results go."""
    add_pair_arguments(parser)
    parser.add_argument("--cost-scale", type=float, default=1.0, metavar="X", help=f"{SCALE} (default: %(default)s)")
    add_out_argument(parser)


def add_out_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="write KIND.json, KIND.md and KIND.png there, too")
    parser.set_defaults(parser=parser)


def add_text_arguments(parser: argparse.ArgumentParser, prompts: int = 20, max_tokens: int = 128) -> None:
    """Which texts to write."""
    add = parser.add_argument
    add("--prompts", nargs="+", metavar="PATH", help="files of prompts: MT-Bench, Spec-Bench or HumanEval (.jsonl),"
        " text or source; or directories of them (default, for the embedded target: Python files that were held"
        " out of its training)")  # fmt: skip
    add("--num-prompts", type=int, default=prompts, help="so many of them, spread evenly (default: %(default)s)")
    add("--prompt-tokens", type=int, help="keep only so many tokens from the beginning of each (default: all)")
    add("--ignore-chat-template", action="store_true", help="continue questions as they are")
    add("--max-tokens", "-m", type=int, default=max_tokens, help="tokens per text (default: %(default)s)")


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


@dataclasses.dataclass
class Pair(Loaded):
    """A target with its drafter."""

    drafter: Drafter

    def decoder(self, max_tokens: int, temp: float = 0.0, seed: int = 0) -> Decoder:
        return Decoder(self.model, self.tokenizer, self.drafter, max_tokens, temp, seed, self.as_loaded)


def load_pair(args: argparse.Namespace, baseline: bool = True) -> Pair:
    """The models that the flags name, the target's cost scaled.

    Args:
        baseline: hold the target as mlx_lm loads it, too, where that differs; without, memory is
            that of one target, and every method runs it.
    """
    check_out(args.out)
    check_scale(args.cost_scale)
    model, drafter, tokenizer = load_from(args, pack_weights=False)
    if drafter is None:
        raise UserError("--draft is missing: a benchmark compares a target with and without its drafter")
    pack(drafter)
    loaded = _loaded(args, model, tokenizer, args.cost_scale, baseline)
    loaded.facts["drafter"] = f"{args.draft or 'embedded'}, {describe(drafter)}"
    return Pair(**vars(loaded), drafter=drafter)


def load_scaled(args: argparse.Namespace, scale: float) -> Loaded:
    """The target alone, at a scale of its cost."""
    model, _, tokenizer = load_from(args, pack_weights=False)
    return _loaded(args, model, tokenizer, scale, baseline=True)


def _loaded(args: argparse.Namespace, model: nn.Module, tokenizer: Any, scale: float, baseline: bool) -> Loaded:
    reached = scale_cost(model, scale)
    as_loaded, layout = model, "as loaded"
    if panels_are_faster():
        layout = "packed for OpenBLAS"
        if baseline:
            as_loaded, _, _ = load_from(args, pack_weights=False)
            scale_cost(as_loaded, scale)
            layout += ", but for mlx_lm's plain loop"
        pack(model)
    facts = device_facts()
    facts["weights"] = layout
    scaled = f" (cost scaled {reached:.2f}x)" if scale > 1 else ""
    facts["target"] = f"{args.model or 'embedded'}, {describe(model)}{scaled}"
    return Loaded(model, tokenizer, facts, command_line(args, args.parser), reached, as_loaded)


def check_texts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts that the flags of `add_text_arguments` name; needs no model, so mistakes show at once."""
    for flag, least in (("--num-prompts", 1), ("--prompt-tokens", 1), ("--max-tokens", 2)):
        in_range(flag, getattr(args, flag[2:].replace("-", "_")), least)
    if args.prompts is not None:
        return evenly(read_prompts(args.prompts), args.num_prompts)
    if args.model is not None:
        raise UserError("--prompts is missing: a file of prompts for this target")
    prompts = [Prompt(text, "held-out Python") for text in held_out_prefixes(args.num_prompts)]
    if not prompts:
        raise UserError("--prompts is missing: this Python has no source of its standard library to take prompts from")
    return prompts


def encode_texts(args: argparse.Namespace, pair: Loaded, prompts: list[Prompt]) -> list[list[int]]:
    """Their token ids, each checked to fit into the target's context; notes in the facts what they are."""
    # The embedded target continues Python and knows nothing of conversations.
    template = args.model is not None and not args.ignore_chat_template
    encoded = [token_ids(prompt, pair.tokenizer, args.prompt_tokens, template) for prompt in prompts]
    longest, limit = max(map(len, encoded)), Target.of(pair.model).context_length
    if limit is not None and longest + args.max_tokens > limit:
        raise UserError(
            f"--prompts: one has {longest} tokens, which with --max-tokens {args.max_tokens} exceeds the target's"
            f" context of {limit}; --prompt-tokens cuts prompts"
        )
    kinds = ", ".join(sorted({prompt.category for prompt in prompts}))
    pair.facts["texts"] = (
        f"{len(encoded)} prompts ({kinds}) of {min(map(len, encoded))} to {longest} tokens, {args.max_tokens} more each"
    )
    return encoded


def in_range(flag: str, value: float | None, least: float, most: float = math.inf) -> None:
    """Raises UserError for a flag out of range; None passes."""
    if value is not None and not least <= value <= most:
        raise UserError(f"{flag} is {value}, expected {least} {'or more' if most == math.inf else f'to {most}'}")
