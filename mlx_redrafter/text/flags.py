"""The flags that every generating command has, and what they stand for."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import mlx.nn as nn
from tqdm import tqdm

from mlx_redrafter.constraints.constraint import Constraint, json_schema, lark, regex
from mlx_redrafter.constraints.thinking import thinking_budget
from mlx_redrafter.decoding.logits_processors import LogitsProcessor
from mlx_redrafter.decoding.sampling import position_keyed
from mlx_redrafter.decoding.step import Progress
from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.drafting.shape import AUTO, BEST_FIRST, LOOKUPS, POLICIES, DraftShape
from mlx_redrafter.embedded import assistant
from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.system.files import read_text
from mlx_redrafter.system.flag_types import real, whole
from mlx_redrafter.target.splitting import way
from mlx_redrafter.text.loading import ASSISTANT, DTYPES, EMBEDDED_PAIR, MTP, NO_DRAFTER, load, place_of
from mlx_redrafter.text.sessions.recorder import settings_of

# Flags that have the names of arguments: of `position_keyed`, and of `stream_generate`.
SAMPLING = ("seed", "top_p", "min_p", "top_k", "min_tokens_to_keep", "xtc_probability", "xtc_threshold")
CONSTRAINTS = ("json_schema", "regex", "grammar")
AS_THEY_ARE = ("max_tokens", "stop", "lookup", "prefill_step_size", "kv_bits", "kv_group_size", "quantized_kv_start")


def add_target_arguments(add: Callable[..., Any], default: str | None = EMBEDDED_PAIR) -> None:
    """Which target.

    Args:
        add: `add_argument` of a parser.
        default: where none is named; None for the assistant, where it is installed (see `choose_target`).
    """
    usual = default or f"{ASSISTANT} where it is installed, else {EMBEDDED_PAIR}"
    add("--model", metavar="PATH", default=default, help="load the target from this directory, GGUF file or Hub id; or"
        f" {ASSISTANT}, {assistant.TITLE}, or {EMBEDDED_PAIR}, which continues Python (default: {usual})")  # fmt: skip
    add("--gguf", metavar="NAME", help="read this GGUF file, named in full or in part, where --model has several")


def add_pair_arguments(
    parser: argparse.ArgumentParser, drafter: bool = True, default: str | None = EMBEDDED_PAIR
) -> None:
    """Which target, and which drafter where there is to be one; `default` as for `add_target_arguments`."""
    add = parser.add_argument
    add_target_arguments(add, default)
    if drafter:
        add("--draft", metavar="PATH", help="load the drafter, or a small model with the target's tokenizer, from this"
            f" directory or Hub id; or {MTP}, the target's own multi-token-prediction layer, {ASSISTANT} or"
            f" {EMBEDDED_PAIR} for theirs, or {NO_DRAFTER} (default: theirs for them, else {NO_DRAFTER})")  # fmt: skip
    else:
        parser.set_defaults(draft=NO_DRAFTER)
    add("--adapter-path", metavar="PATH", help="add the LoRA adapters of this directory to the target, as in mlx-lm")
    add("--dtype", choices=DTYPES, help="convert the target's unquantised weights to this type (default: keep theirs;"
        " float32 for the embedded pair)")  # fmt: skip
    add("--trust-remote-code", action="store_true", help="run the Python code that the model's directory brings along")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which target, which drafter, how much to draft."""
    add_pair_arguments(parser, default=None)
    add = parser.add_argument
    add("--beam-width", type=number_or_auto, default=AUTO, metavar="W", help="draft this many beams; 1 drafts a chain,"
        " auto measures steps and chooses all three (default: auto; 1 if one of the next two is given)")  # fmt: skip
    add("--beam-length", type=number_or_auto, default=AUTO, metavar="L", help="make a beam this many tokens long, the"
        " root included (default: auto; 4 for a chain, 5 for a tree, if another of the three is given)")  # fmt: skip
    add("--num-draft-tokens", type=number_or_auto, default=AUTO, metavar="N", help="verify this many draft tokens per"
        " step (default: auto; all of a chain, 7 of a tree, if another of the three is given)")  # fmt: skip
    add("--lookup", choices=LOOKUPS, help="copy drafts from earlier text: in every step (on), where it pays (auto) or"
        " never (off) (default: auto if there is a drafter whose shape is auto, else off)")  # fmt: skip
    add("--tree-policy", choices=POLICIES, help="verify a tree's most probable tokens (best-first) or those of whole"
        " beams (beams, 4 wide if no width is given) (default: best-first)")  # fmt: skip


def add_generation_arguments(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """How much text, and how the target chooses."""
    add_choice_arguments(parser, max_tokens)
    add = parser.add_argument
    add("--min-tokens-to-keep", type=whole(1), default=1, metavar="N", help="keep at least this many tokens whatever"
        " --min-p says (default: %(default)s)")  # fmt: skip
    add("--xtc-probability", type=real(0, 1), default=0.0, metavar="P", help="apply XTC to this share of the tokens"
        " (default: 0, none)")  # fmt: skip
    add("--xtc-threshold", type=real(0, 0.5), default=0.1, metavar="P", help="let XTC drop tokens above this"
        " probability, but the last of them (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="fix the sampling: a seed gives one text, drafted or not"
        " (default: %(default)s)")  # fmt: skip
    add("--system-prompt", metavar="TEXT", help="begin the conversation with this system message")
    add("--chat-template-config", metavar="JSON", help="give the chat template the arguments of this JSON object")
    add("--extra-eos-token", nargs="+", default=(), metavar="TOKEN", help="end the text at these tokens, too")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--json-schema", metavar="FILE", help="write JSON that the schema in this file allows (docs/structured.md)")
    one("--regex", metavar="EXPR", help="write what this regular expression matches as a whole")
    one("--grammar", metavar="FILE", help="write what the grammar in this file derives, in llguidance's form of Lark")
    # What fulfils a schema from its first token on has no thoughts.
    one("--thinking-budget", type=whole(0), metavar="N", help="end a thought after this many tokens, for models that"
        " think between tokens of their own (default: no limit)")  # fmt: skip
    add("--stop", nargs="+", default=(), metavar="TEXT", help="end the text before any of these texts")
    add_cache_arguments(parser)


def add_choice_arguments(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """How much text, and from which tokens the target chooses."""
    add = parser.add_argument
    tokens = whole(1, also=(-1,), words="1 or more, or -1 for no limit")
    add("--max-tokens", "-m", type=tokens, default=max_tokens, metavar="N", help="end the text after this many tokens;"
        " -1 sets no limit (default: %(default)s)")  # fmt: skip
    add("--temp", type=real(0), default=0.0, metavar="T", help="sample at this temperature; 0 takes the most probable"
        " token (default: %(default)s)")  # fmt: skip
    add("--top-p", type=real(0, 1), default=1.0, metavar="P", help="sample from the most probable tokens that make up"
        " this share (default: 1, all)")  # fmt: skip
    add("--min-p", type=real(0, 1), default=0.0, metavar="P", help="drop tokens below this share of the best token's"
        " probability (default: 0, none)")  # fmt: skip
    add("--top-k", type=whole(0), default=0, metavar="K", help="sample from the K most probable tokens (default: 0,"
        " all)")  # fmt: skip


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """How prompts are read into the KV cache, and how it is kept."""
    add = parser.add_argument
    add("--prefill-step-size", type=whole(1), default=2048, metavar="N", help="read the prompt in pieces of this many"
        " tokens (default: %(default)s)")  # fmt: skip
    add("--kv-bits", type=int, choices=(2, 4, 8), help="quantise the KV cache to this many bits (default: do not)")
    add("--kv-group-size", type=int, choices=(32, 64, 128), default=64, help="quantise this many values with one scale"
        " (default: %(default)s)")  # fmt: skip
    add("--quantized-kv-start", type=whole(0), default=5000, metavar="N", help="quantise the KV cache once it holds"
        " this many tokens (default: %(default)s)")  # fmt: skip


def add_recording_argument(parser: argparse.ArgumentParser) -> None:
    """Whether what is asked and answered is kept."""
    parser.add_argument("--record-sessions", action="store_true", help="keep questions and answers on this machine, for"
        " `mlx-redrafter train --data sessions`; `mlx-redrafter sessions` shows and deletes them")  # fmt: skip


def add_pipeline_argument(parser: argparse.ArgumentParser) -> None:
    """How processes that mlx.launch starts divide the target."""
    parser.add_argument("--pipeline", action="store_true", help="with several processes (mlx.launch), give each of them"
        " some of the target's layers, not a part of each (docs/several-macs.md)")  # fmt: skip


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
    # A policy chooses between the branches of a tree; a chain has none.
    usual_width = 1 if policy == BEST_FIRST else 4
    width = usual_width if args.beam_width == AUTO else args.beam_width
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
    ends = (*tokenizer.encode("\n"), *tokenizer.eos_token_ids)
    sampling = {name: getattr(args, name) for name in SAMPLING}
    return {name: getattr(args, name) for name in AS_THEY_ARE} | {
        "chooser": position_keyed(args.temp, xtc_special_tokens=ends, **sampling),
        "shape": draft_shape(args),
        "constraint": constraint_of(args),
        "logits_processors": [*_thinking(args.thinking_budget, tokenizer)],
        "prompt_progress_callback": _progress(),
    }


def generation_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_generation_arguments` as `Recorder.note` takes them."""
    changed = {
        name: getattr(args, name)
        for name in (*CONSTRAINTS, "thinking_budget", "adapter_path", "chat_template_config", "extra_eos_token", "stop")
    }
    return settings_of(args.temp, changed, **{name: getattr(args, name) for name in SAMPLING})


def constraint_of(args: argparse.Namespace) -> Constraint | None:
    """What the text has to be; None for anything. Raises UserError, before anything is loaded."""
    if args.regex is not None:
        return regex(args.regex, f"--regex {args.regex[:40]}")
    if args.json_schema is not None:
        return json_schema(read_text(pathlib.Path(args.json_schema)), f"--json-schema {args.json_schema}")
    if args.grammar is not None:
        return lark(read_text(pathlib.Path(args.grammar)), f"--grammar {args.grammar}")
    return None


def _thinking(budget: int | None, tokenizer: Any) -> Iterator[LogitsProcessor]:
    if budget is not None:
        if not tokenizer.has_thinking:
            raise UserError("--thinking-budget: the model's tokenizer has no tokens that begin and end thoughts")
        yield thinking_budget(tokenizer.think_start_tokens, tokenizer.think_end_tokens, budget)


def template_options(args: argparse.Namespace) -> dict[str, Any]:
    """The object of --chat-template-config. Raises UserError."""
    if args.chat_template_config is None:
        return {}
    try:
        options = json.loads(args.chat_template_config)
    except ValueError as error:
        raise UserError(f"--chat-template-config: not JSON ({one_line(error)})") from error
    if not isinstance(options, dict):
        raise UserError(f"--chat-template-config: found a JSON {type(options).__name__}, expected an object")
    return options


def choose_target(args: argparse.Namespace, with_drafter: bool = False) -> str:
    """Names the target where the flags of `add_model_arguments` do not: the assistant, else the embedded one.

    Args:
        with_drafter: an assistant without its drafter is of no use; otherwise it gets drafts by lookup.

    Returns:
        one line for people that says what is used; empty where they said it themselves.
    """
    if args.model is not None:
        return ""
    alone = args.draft is None and assistant.drafter_folder() is None
    missing = ""
    if assistant.weights_file() is None:
        missing = f"the assistant is not installed, `{assistant.INSTALL}` brings it"
    elif alone and with_drafter:
        missing = "this installation has no drafter for the assistant"
    args.model = EMBEDDED_PAIR if missing else ASSISTANT
    if missing:
        return f"Model: {EMBEDDED_PAIR}, which continues Python; {missing}"
    if alone and args.lookup is None:
        args.lookup = AUTO
    said = f"Model: {ASSISTANT}, which is {assistant.TITLE}"
    return f"{said}; this installation has no drafter for it" if alone else said


def load_from(args: argparse.Namespace, pack_weights: bool = True) -> tuple[nn.Module, Drafter | None, Any]:
    """What the flags of `add_pair_arguments` name; one of several processes loads its part."""
    return load(
        args.model,
        args.draft,
        gguf=args.gguf,
        adapter_path=args.adapter_path,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
        pack_weights=pack_weights,
        split=way(getattr(args, "pipeline", False)),
    )


def model_name(args: argparse.Namespace) -> str:
    """The model's name in a prompt-cache file; mlx-lm loads the model by it."""
    return place_of(args.model, "--model", args.gguf)


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
