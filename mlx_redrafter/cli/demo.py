"""`mlx-redrafter demo`: answers as they come, what was drafted in colour, and how fast each way writes them.

With --show-tree, one text step by step: what was drafted, accepted and rejected.
"""

from __future__ import annotations

import argparse
from typing import Any

import mlx.nn as nn

from mlx_redrafter.benchmarks.compare import Method, measure, side_by_side, table
from mlx_redrafter.benchmarks.competitors import Decoder
from mlx_redrafter.benchmarks.flags import add_prompt_arguments, check_texts
from mlx_redrafter.benchmarks.pair import encode_prompts
from mlx_redrafter.decoding.sampling import greedy
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.decoding.trace import watch
from mlx_redrafter.decoding.tree_view import GREEN, colours, painted, show
from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.drafting.shape import AUTO, OFF, DraftShape
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.device import device_facts
from mlx_redrafter.system.flag_types import whole
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.text.flags import add_model_arguments, choose_target, draft_shape, load_from
from mlx_redrafter.text.loading import EMBEDDED_PAIR, is_embedded
from mlx_redrafter.tuning.session import drafting_for

HELP = "answer questions with drafts, and compare the speed of several ways to do so"
TREE = DraftShape(4, 5, 7)
PLAIN = "plain (mlx_lm)"
PYTHON_FILES, QUESTIONS_ASKED = 20, 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_prompt_arguments(parser, None, f"{PYTHON_FILES} Python files, or {QUESTIONS_ASKED} questions")
    add = parser.add_argument
    add("--embedded", dest="model", action="store_const", const=EMBEDDED_PAIR, help="take the embedded pair, as with"
        f" --model {EMBEDDED_PAIR}")  # fmt: skip
    add("--max-tokens", "-m", type=whole(2), help="tokens per text (default: 128; 32 with --show-tree)")
    add("--show-tree", action="store_true", help="write one text and show every step's tree: which words were drafted,"
        " accepted, rejected; without a shape, trees of 7")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    if args.max_tokens is None:
        args.max_tokens = 32 if args.show_tree else 128
    said = choose_target(args, with_drafter=True)
    if args.num_prompts is None:
        args.num_prompts = PYTHON_FILES if is_embedded(args.model) else QUESTIONS_ASKED
    prompts = check_texts(args, any_target=True)
    asked = draft_shape(args)
    model, drafter, tokenizer = load_from(args)
    if drafter is None and args.lookup in (None, OFF):
        raise UserError("--draft is missing: the demo compares a target with and without its drafter")
    texts = encode_prompts(args, model, tokenizer, prompts)
    print(said or f"Model: {args.model}")
    if args.show_tree:
        shape = TREE if asked == AUTO else asked
        assert isinstance(shape, DraftShape)
        print(f"{prompts[0].text}\n")
        return show_trees(model, drafter, tokenizer, texts[0], shape, args.lookup or OFF, args.max_tokens)
    ways = ways_to_write(args, Decoder(model, tokenizer, drafter, args.max_tokens), asked)
    facts = device_facts()
    products = facts.get("float32 products by")
    print(f"Device: {facts['device']}" + (f"; float32 products by {products}" if products else ""))
    asked_for = list(ways)[-1]
    answered = [(asked_for, i) for i, prompt in enumerate(prompts[:QUESTIONS_ASKED]) if prompt.message]
    for way, i in answered or [(PLAIN, 0), (asked_for, 0)]:
        print(f"\n--- {way}: {prompts[i].category}\n{prompts[i].text}", end="\n\n" if answered else "")
        measure(ways[way](texts[i]), show=write)
        print()
    print("\n" + table(side_by_side(ways, texts)).text())
    print("Speed-up: over mlx_lm's loop on the same weights in the same layout")


def ways_to_write(args: argparse.Namespace, decoder: Decoder, asked: DraftShape | str) -> dict[str, Method]:
    """Plain decoding first, what the flags ask for last, and usual shapes between them where there is a drafter."""
    ways: dict[str, Method] = {PLAIN: decoder.plain, "plain (our loop)": decoder.ours}
    source = "drafted" if args.lookup in (None, OFF) else f"lookup {args.lookup}"
    usual = [DraftShape(), *([TREE] if is_embedded(args.model) else [])]
    if decoder.drafter is None:
        source, usual = "lookup", []
    for shape in [*(each for each in usual if each != asked), asked]:
        with_lookup = shape == AUTO and decoder.drafter is not None and args.lookup is None
        name = f"{'drafter and lookup' if with_lookup else source}, {describe(shape)}"
        ways[name] = decoder.drafted(shape, args.lookup)
    return ways


def write(text: str, drafted: bool) -> None:
    """A piece of text as it comes, green where it was drafted."""
    print(painted(text, GREEN, drafted and colours()), end="", flush=True)


def show_trees(
    model: nn.Module,
    drafter: Drafter | None,
    tokenizer: Any,
    prompt: list[int],
    shape: DraftShape,
    lookup: str,
    count: int,
) -> None:
    """Writes one text greedily and prints every step's tree, and the text with what was drafted marked."""
    verifier = verifier_of(model).checked("--show-tree: this target")
    shape.check(verifier.target.vocab_size if drafter is None else drafter.config.scored)
    proposer, planner, _ = drafting_for(verifier, drafter, shape, lookup, prompt, greedy)
    colour, steps = colours(), 0
    pieces: list[tuple[str, bool]] = []
    detokenizer, ends, made = tokenizer.detokenizer, set(tokenizer.eos_token_ids), 0
    for step, tokens in watch(verifier, proposer, prompt, DecodingOptions(max_tokens=count), planner, drafter, ends):
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
