"""`mlx-redrafter demo`: the same text twice, once plainly and once with the drafter, side by side.

With --show-tree, one text step by step: what was drafted, accepted and rejected.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import mlx.nn as nn
import mlx_lm

from mlx_redrafter.benchmarks.side_by_side import Method, measure, side_by_side, table
from mlx_redrafter.decoding.options import DecodingOptions
from mlx_redrafter.decoding.sampling import greedy
from mlx_redrafter.decoding.trace import watch
from mlx_redrafter.decoding.tree_view import GREEN, colours, painted, show
from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.drafting.shape import AUTO, OFF, DraftShape
from mlx_redrafter.embedded.corpus import held_out_prefixes
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.device import device_facts
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import NONE
from mlx_redrafter.text.flags import add_model_arguments, draft_shape, load_from
from mlx_redrafter.text.generate import stream_generate
from mlx_redrafter.text.prompts import encode
from mlx_redrafter.tuning.session import drafting_for

HELP = "write the same text plainly and with the drafter, and compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    add("--max-tokens", "-m", type=int, help="tokens per text (default: 128; 32 with --show-tree)")
    add("--prompts", type=int, default=20, help="texts to measure; the first one is shown (default: %(default)s)")
    add("--show-tree", action="store_true", help="write one text and show every step's tree: which words were drafted,"
        " accepted, rejected; without a shape, trees of 7")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    if args.max_tokens is None:
        args.max_tokens = 32 if args.show_tree else 128
    if args.max_tokens < 2 or args.prompts < 1:
        raise UserError("--max-tokens has to be 2 or more, --prompts 1 or more")
    asked = draft_shape(args)
    model, drafter, tokenizer = load_from(args)
    if drafter is None and args.lookup in (None, OFF):
        raise UserError("--draft is missing: the demo compares a target with and without its drafter")
    prompts = held_out_prefixes(args.prompts)
    if not prompts:
        raise UserError("this Python has no source of its standard library to take prompts from")
    if args.show_tree:
        shape = DraftShape(4, 5, 7) if asked == AUTO else asked
        assert isinstance(shape, DraftShape)
        return show_trees(model, drafter, tokenizer, prompts[0], shape, args.lookup or OFF, args.max_tokens)

    def plain(prompt: str) -> Iterable:
        return mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=args.max_tokens)

    def drafted(shape: DraftShape | str) -> Method:
        options: dict[str, Any] = {"max_tokens": args.max_tokens, "shape": shape, "lookup": args.lookup}
        return lambda prompt: stream_generate(model, tokenizer, prompt, drafter, **options)

    methods: dict[str, Method] = {"plain (mlx_lm)": plain}
    source = "lookup" if drafter is None else "drafted" if args.lookup in (None, OFF) else f"lookup {args.lookup}"
    beside = [DraftShape(), DraftShape(4, 5, 7)] if asked == AUTO else [DraftShape(4, 5, 7)]
    for shape in [asked] if drafter is None else dict.fromkeys([asked, *beside]):
        with_lookup = shape == AUTO and drafter is not None and args.lookup is None
        methods[f"{'drafter and lookup' if with_lookup else source}, {describe(shape)}"] = drafted(shape)
    print(f"Target: {args.model or 'embedded, 12.6 M parameters, continues Python'}")
    facts = device_facts()
    products = facts.get("float32 products by")
    print(f"Device: {facts['device']}" + (f"; float32 products by {products}" if products else ""))
    for name, method in list(methods.items())[:2]:
        print(f"\n--- {name}: continuing a file that was held out of training\n{prompts[0]}", end="")
        print("\033[36m" if colours() else "", end="")
        measure(method(prompts[0]), show=True)
        print("\033[0m" if colours() else "")
    print("\n" + table(side_by_side(methods, prompts)))


def show_trees(
    model: nn.Module, drafter: Drafter | None, tokenizer: Any, prompt: str, shape: DraftShape, lookup: str, count: int
) -> None:
    """Writes one text greedily and prints every step's tree, and the text with what was drafted marked."""
    verifier = verifier_of(model)
    if verifier.capability == NONE:
        raise UserError(f"--show-tree: this target cannot verify drafts: {verifier.reason}")
    shape.check(verifier.target.vocab_size if drafter is None else drafter.config.scored)
    colour, steps = colours(), 0
    pieces: list[tuple[str, bool]] = []
    detokenizer, ends, made = tokenizer.detokenizer, set(tokenizer.eos_token_ids), 0
    ids = encode(tokenizer, prompt)
    proposer, planner, _ = drafting_for(verifier, drafter, shape, lookup, ids, greedy)
    print(f"{prompt}\n")
    for step, tokens in watch(verifier, proposer, ids, DecodingOptions(max_tokens=count), planner, drafter, ends):
        if step is not None:
            steps += 1
            print(show(step, steps, tokenizer, colour) + "\n", flush=True)
        accepted = 0 if step is None else sum(node.accepted for node in step.nodes) - 1
        made += len(tokens)
        for i, token in enumerate(tokens):
            if token not in ends:
                detokenizer.add_token(token)
                pieces.append((detokenizer.last_segment, i < accepted))
    detokenizer.finalize()
    pieces.append((detokenizer.last_segment, False))
    print("The text" + (" (drafted words green):" if colour else ":"))
    print("".join(painted(text, GREEN, colour and drafted) for text, drafted in pieces))
    print(f"\n{made} tokens, {steps} steps after the first: {(made - 1) / max(1, steps):.2f} tokens per step")


def describe(shape: DraftShape | str) -> str:
    """A shape in a few words."""
    if isinstance(shape, str):
        return shape
    return f"{'chain' if shape.beam_width == 1 else 'tree'} of {shape.num_draft_tokens}"
