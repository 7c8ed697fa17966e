"""`mlx-redrafter generate`, and the flags that every generating command has."""

from __future__ import annotations

import argparse
import json
import sys

import mlx.core as mx

from .beam_search import BEST_FIRST, POLICIES
from .decoding import DraftShape
from .errors import UserError
from .generate import GenerationResponse, encode, stream_generate, summary
from .loading import DTYPES, NO_DRAFTER, load, one_line
from .sampling import Chooser, position_keyed

HELP = "continue a prompt"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which target, which drafter, how much to draft."""
    add = parser.add_argument
    add("--model", help="directory or Hub id of the target (default: the embedded pair)")
    add("--draft", metavar="PATH|none", help="directory or Hub id of the drafter, or none to decode plainly"
        " (default: the embedded drafter for the embedded target, else none)")  # fmt: skip
    add("--adapter-path", help="LoRA adapters, as in mlx-lm")
    add("--dtype", choices=DTYPES, help="type of the target's unquantised weights (default: as they are;"
        " float32 for the embedded pair)")  # fmt: skip
    add("--trust-remote-code", action="store_true")
    add("--beam-width", type=int, default=4, help="beams W (default: %(default)s)")
    add("--beam-length", type=int, default=5, help="tokens per beam L, the root included (default: %(default)s)")
    add("--num-draft-tokens", type=int, help="draft tokens N the target checks per step"
        " (default: 7, or W (L - 1) if that is less)")  # fmt: skip
    add("--tree-policy", choices=POLICIES, default=BEST_FIRST, help="which of the drafted tokens are checked"
        " (default: %(default)s)")  # fmt: skip


def add_generation_arguments(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """How much text, and how the target chooses."""
    add = parser.add_argument
    add("--max-tokens", "-m", type=int, default=max_tokens, help="-1 for no limit (default: %(default)s)")
    add("--temp", type=float, default=0.0, help="temperature; 0 is greedy (default: %(default)s)")
    add("--top-p", type=float, default=1.0)
    add("--min-p", type=float, default=0.0)
    add("--top-k", type=int, default=0)
    add("--seed", type=int, default=0, help="the same seed gives the same text, drafted or not (default: 0)")
    add("--system-prompt", help="for the chat template")
    add("--prefill-step-size", type=int, default=2048, help="prompt tokens read at a time (default: %(default)s)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_generation_arguments(parser, max_tokens=100)
    add = parser.add_argument
    add("--prompt", "-p", required=True, help="text to continue or to answer; - reads standard input")
    add("--ignore-chat-template", action="store_true", help="continue the prompt as it is")
    add("--json", action="store_true", help="print one JSON object when done, and nothing else")


def draft_shape(args: argparse.Namespace) -> DraftShape:
    """The flags as a checked shape, except for what only the vocabulary can tell."""
    most = args.beam_width * (args.beam_length - 1)
    budget = min(7, most) if args.num_draft_tokens is None else args.num_draft_tokens
    shape = DraftShape(args.beam_width, args.beam_length, budget, args.tree_policy)
    shape.check(vocab_size=2**31)
    return shape


def chooser(args: argparse.Namespace) -> Chooser:
    return position_keyed(args.temp, args.seed, args.top_p, args.min_p, args.top_k)


def apply_template(tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation by the tokenizer's chat template. Raises UserError where it fails."""
    try:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    except Exception as error:  # templates are programs of their own
        raise UserError(f"the tokenizer's chat template: {one_line(error)}") from error


def prompt_tokens(args: argparse.Namespace, tokenizer) -> list[int]:
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not text:
        raise UserError("--prompt is empty, expected text")
    # The embedded target continues Python and knows nothing of conversations.
    if args.ignore_chat_template or args.model is None or tokenizer.chat_template is None:
        if args.system_prompt is not None:
            raise UserError("--system-prompt needs a chat template, which is not used here")
        return encode(tokenizer, text)
    system = [] if args.system_prompt is None else [{"role": "system", "content": args.system_prompt}]
    return apply_template(tokenizer, [*system, {"role": "user", "content": text}])


def run(args: argparse.Namespace) -> None:
    shape, choose = draft_shape(args), chooser(args)
    if args.prompt == "":
        raise UserError("--prompt is empty, expected text")
    model, drafter, tokenizer = load(
        args.model,
        args.draft,
        adapter_path=args.adapter_path,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )
    mx.reset_peak_memory()
    pieces, tokens, response = [], [], None
    for response in stream_generate(
        model,
        tokenizer,
        prompt_tokens(args, tokenizer),
        drafter,
        max_tokens=args.max_tokens,
        chooser=choose,
        shape=shape,
        prefill_step_size=args.prefill_step_size,
    ):
        pieces.append(response.text)
        tokens.append(response.token)
        if not args.json:
            print(response.text, end="", flush=True)
    assert response is not None
    if args.json:
        print(json.dumps(report("".join(pieces), tokens, response)))
    else:
        print("\n" + "=" * 10 + "\n" + summary(response))
        if drafter is None and args.draft is None and args.model is not None:
            print(f"No drafter was given (--draft PATH, or --draft {NO_DRAFTER} to say so): decoded plainly")


def report(text: str, tokens: list[int], last: GenerationResponse) -> dict:
    """What `--json` prints."""
    return {
        "text": text,
        "tokens": tokens,
        "prompt_tokens": last.prompt_tokens,
        "prompt_tps": last.prompt_tps,
        "generation_tokens": last.generation_tokens,
        "generation_tps": last.generation_tps,
        "steps": last.steps,
        "mean_acceptance_length": last.mean_acceptance_length,
        "acceptance_by_position": last.acceptance_by_position,
        "peak_memory_gb": last.peak_memory,
        "finish_reason": last.finish_reason,
        "method": last.method,
        "reason": last.reason,
    }
