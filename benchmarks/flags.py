"""The flags that benchmarks share, and the prompts that they name.

Knows nothing of what is measured.
"""

from __future__ import annotations

import argparse

from mlx_redrafter.benchmarks.prompts import Prompt, evenly, read_prompts

from mlx_redrafter.embedded.assistant import QUESTIONS
from mlx_redrafter.embedded.corpus import held_out_prefixes
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.flag_types import real, whole
from mlx_redrafter.text.flags import add_pair_arguments
from mlx_redrafter.text.loading import ASSISTANT, is_embedded

SCALE = (
    "widen the target's feed-forward layers by neurons that contribute nothing, until a token reads X times the"
    " weights: same text, higher cost"
)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The pair, the scale of its cost, and where results go."""
    add_pair_arguments(parser)
    parser.add_argument("--cost-scale", type=real(1, 1000), default=1.0, metavar="X",
        help=f"{SCALE} (default: %(default)s)")  # fmt: skip
    add_out_argument(parser)


def add_out_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="write KIND.json, KIND.md and KIND.png there, too")
    parser.set_defaults(parser=parser)


def add_prompt_arguments(parser: argparse.ArgumentParser, prompts: int | None = 20, usual: str = "%(default)s") -> None:
    """Which prompts to continue; `usual` says how many where `prompts` does not."""
    add = parser.add_argument
    add("--prompts", nargs="+", metavar="PATH", help="files of prompts: MT-Bench, Spec-Bench or HumanEval (.jsonl),"
        " text or source; or directories of them (default: for the embedded target Python files that were held"
        " out of its training, for the assistant everyday questions)")  # fmt: skip
    add("--num-prompts", type=whole(1), default=prompts, help=f"so many of them, spread evenly (default: {usual})")
    add("--prompt-tokens", type=whole(1), help="keep only so many tokens from the beginning of each (default: all)")
    add("--ignore-chat-template", action="store_true", help="continue the prompt as it is")


def add_text_arguments(parser: argparse.ArgumentParser, prompts: int = 20, max_tokens: int = 128) -> None:
    """Which texts to write."""
    add_prompt_arguments(parser, prompts)
    help = "tokens per text (default: %(default)s)"
    parser.add_argument("--max-tokens", "-m", type=whole(2), default=max_tokens, help=help)


def add_round_arguments(parser: argparse.ArgumentParser, temps: list[float]) -> None:
    """At which temperatures, and how often."""
    add = parser.add_argument
    shown = " ".join(f"{temp:g}" for temp in temps)
    add("--temps", type=real(0), nargs="+", default=temps, help=f"temperatures, one after the other (default: {shown})")
    add("--seed", type=int, default=0, help="of the texts at a temperature (default: %(default)s)")
    add("--repeats", type=whole(1), default=1, help="rounds per prompt (default: %(default)s)")


def check_texts(args: argparse.Namespace, any_target: bool = False) -> list[Prompt]:
    """The prompts that the flags of `add_text_arguments` name; needs no model, so mistakes show at once.

    Args:
        any_target: without --prompts, the assistant's questions will do for every target but the embedded one.
    """
    if args.prompts is not None:
        return evenly(read_prompts(args.prompts), args.num_prompts)
    if args.model == ASSISTANT or (any_target and not is_embedded(args.model)):
        return evenly([Prompt(text, kind, message=True) for kind, text in QUESTIONS], args.num_prompts)
    if not is_embedded(args.model):
        raise UserError("--prompts is missing: a file of prompts for this target")
    prompts = [Prompt(text, "held-out Python") for text in held_out_prefixes(args.num_prompts)]
    if not prompts:
        raise UserError("--prompts is missing: this Python has no source of its standard library to take prompts from")
    return prompts
