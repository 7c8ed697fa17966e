"""The flags that every generating command has, and what they stand for."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import mlx.nn as nn
from tqdm import tqdm

from mlx_redrafter.decoding.options import Progress
from mlx_redrafter.decoding.sampling import position_keyed
from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.drafting.shape import AUTO, BEST_FIRST, LOOKUPS, POLICIES, DraftShape
from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.text.loading import DTYPES, EMBEDDED, NO_DRAFTER, load


def add_pair_arguments(parser: argparse.ArgumentParser, drafter: bool = True) -> None:
    """Which target, and which drafter where there is to be one."""
    add = parser.add_argument
    add("--model", help="directory or Hub id of the target (default: the embedded pair)")
    if drafter:
        add("--draft", metavar="PATH|none", help="directory or Hub id of the drafter, or none to decode without one"
            " (default: the embedded drafter for the embedded target, else none)")  # fmt: skip
    else:
        parser.set_defaults(draft=NO_DRAFTER)
    add("--adapter-path", help="LoRA adapters, as in mlx-lm")
    add("--dtype", choices=DTYPES, help="type of the target's unquantised weights (default: as they are;"
        " float32 for the embedded pair)")  # fmt: skip
    add("--trust-remote-code", action="store_true")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which target, which drafter, how much to draft."""
    add_pair_arguments(parser)
    add = parser.add_argument
    add("--beam-width", type=number_or_auto, default=AUTO, metavar="W", help="beams; 1 drafts a chain. auto measures"
        " what steps cost here, chooses all three while it writes, and decodes plainly where drafting does not pay"
        " (default: auto; 1 if one of the other two is given)")  # fmt: skip
    add("--beam-length", type=number_or_auto, default=AUTO, metavar="L", help="tokens per beam, the root included"
        " (default: auto; if one of the other two is given 4, or 5 with more than one beam)")  # fmt: skip
    add("--num-draft-tokens", type=number_or_auto, default=AUTO, metavar="N", help="draft tokens that the"
        " target checks per step (default: auto; if another is given all of a chain, or 7 of a tree)")  # fmt: skip
    add("--lookup", choices=LOOKUPS, help="also draft what followed in the text so far where it went like now: on in"
        " every step, auto in those where it pays, up to 15 tokens; with --draft none, lookup alone (default: auto"
        " where the three above are, with a drafter, else off)")  # fmt: skip
    add("--tree-policy", choices=POLICIES, help="which of the drafted tokens are checked (default: best-first;"
        " beams is not for auto, and counts as a given number)")  # fmt: skip


def add_generation_arguments(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """How much text, and how the target chooses."""
    add = parser.add_argument
    add("--max-tokens", "-m", type=int, default=max_tokens, help="-1 for no limit (default: %(default)s)")
    add("--temp", type=float, default=0.0, help="temperature; 0 is greedy (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="keep the most probable tokens up to this share (default: all)")
    add(
        "--min-p",
        type=float,
        default=0.0,
        help="keep tokens of this share of the best's probability (default: all)",
    )
    add("--min-tokens-to-keep", type=int, default=1, help="that --min-p leaves at least (default: %(default)s)")
    add("--top-k", type=int, default=0, help="keep this many tokens (default: all)")
    add("--xtc-probability", type=float, default=0.0, help="how often XTC applies (default: never)")
    add("--xtc-threshold", type=float, default=0.1, help="probability that XTC counts as high (default: %(default)s)")
    add("--seed", type=int, default=0, help="the same seed gives the same text, drafted or not (default: 0)")
    add("--system-prompt", help="for the chat template")
    add("--chat-template-config", metavar="JSON", help="more arguments for the chat template")
    add(
        "--extra-eos-token",
        nargs="+",
        default=(),
        metavar="TOKEN",
        help="tokens that end the text besides the model's",
    )
    add("--stop", nargs="+", default=(), metavar="TEXT", help="texts that end the text; they are not printed")
    add("--prefill-step-size", type=int, default=2048, help="prompt tokens read at a time (default: %(default)s)")
    add("--kv-bits", type=int, choices=(2, 4, 8), help="bits of the KV cache (default: as the model makes it)")
    add("--kv-group-size", type=int, choices=(32, 64, 128), default=64, help="(default: %(default)s)")
    add("--quantized-kv-start", type=int, default=5000, help="rows from which --kv-bits applies (default: %(default)s)")


def number_or_auto(text: str) -> int | str:
    """A flag's whole number, or "auto"."""
    if text == AUTO:
        return AUTO
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor {AUTO}") from None


def draft_shape(args: argparse.Namespace) -> DraftShape | str:
    """The flags as a checked shape, except for what only the vocabulary can tell; "auto" where none is given."""
    policy = args.tree_policy or BEST_FIRST
    if {args.beam_width, args.beam_length, args.num_draft_tokens} == {AUTO} and policy == BEST_FIRST:
        return AUTO
    width = 1 if args.beam_width == AUTO else args.beam_width
    length = (4 if width == 1 else 5) if args.beam_length == AUTO else args.beam_length
    most = width * (length - 1)
    usual = most if width == 1 else min(7, most)
    budget = usual if args.num_draft_tokens == AUTO else args.num_draft_tokens
    shape = DraftShape(width, length, budget, policy)
    shape.check(vocab_size=2**31)
    return shape


def generation_options(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """The flags of `add_generation_arguments` as arguments of `stream_generate`."""
    for token in args.extra_eos_token:
        try:
            tokenizer.add_eos_token(token)
        except ValueError as error:
            raise UserError(f"--extra-eos-token {token}: {one_line(error)}") from error
    choose = position_keyed(
        args.temp,
        args.seed,
        args.top_p,
        args.min_p,
        args.top_k,
        args.min_tokens_to_keep,
        args.xtc_probability,
        args.xtc_threshold,
        [*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
    )
    return {
        "max_tokens": args.max_tokens,
        "chooser": choose,
        "stop": args.stop,
        "shape": draft_shape(args),
        "lookup": args.lookup,
        "prefill_step_size": args.prefill_step_size,
        "prompt_progress_callback": _progress(),
        "kv_bits": args.kv_bits,
        "kv_group_size": args.kv_group_size,
        "quantized_kv_start": args.quantized_kv_start,
    }


def template_options(args: argparse.Namespace) -> dict[str, Any]:
    if args.chat_template_config is None:
        return {}
    try:
        options = json.loads(args.chat_template_config)
    except ValueError as error:
        raise UserError(f"--chat-template-config: not JSON ({one_line(error)})") from error
    if not isinstance(options, dict):
        raise UserError(f"--chat-template-config: found a JSON {type(options).__name__}, expected an object")
    return options


def load_from(args: argparse.Namespace, pack_weights: bool = True) -> tuple[nn.Module, Drafter | None, Any]:
    """What the flags of `add_pair_arguments` name."""
    return load(
        args.model,
        args.draft,
        adapter_path=args.adapter_path,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        pack_weights=pack_weights,
    )


def model_name(args: argparse.Namespace) -> str:
    """The model's name in a prompt-cache file; mlx-lm loads the model by it."""
    return args.model or str(EMBEDDED / "target")


def _progress() -> Progress | None:
    """A bar for long prompts, where somebody is looking."""
    if not sys.stderr.isatty():
        return None
    bar: tqdm | None = None

    def show(read: int, total: int) -> None:
        nonlocal bar
        if bar is None and total > 512:
            bar = tqdm(total=total, desc="reading the prompt", unit="tok", leave=False)
        if bar is not None:
            bar.update(read - bar.n)
            if read == total:
                bar.close()
                bar = None

    return show
