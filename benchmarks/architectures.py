"""What each of mlx-lm's model modules can be used for, and whether its text stays the same.

python -m mlx_redrafter.benchmarks.architectures [--out docs] [MODULE ...]

A small random float32 instance of every module that decodes text (see `small_models`)
writes 64 tokens greedily: with mlx_lm, with a drafter that knows nothing, with one that
knows the continuation, and with mlx_lm again. Windows have 16 tokens, so that all of them
wrap. The outcome goes to architectures.md and architectures.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import mlx_redrafter  # isort: skip  (before mlx: it puts OpenBLAS in front of MLX's BLAS)

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import ArraysCache, RotatingKVCache, make_prompt_cache
from mlx_lm.utils import load_tokenizer
from mlx_redrafter.benchmarks.small_models import PerfectDrafter, build, modules, random_drafter

from mlx_redrafter.drafting.redrafter import RecurrentDrafter
from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.system.files import replace_file
from mlx_redrafter.target.cache.kv_cache import leaves
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import CHAIN, NONE, TREE
from mlx_redrafter.text.loading import EMBEDDED

TOKENS = 64
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38]
SHAPE = DraftShape(beam_width=2, beam_length=5, num_draft_tokens=6)


@dataclasses.dataclass
class Outcome:
    """One row of the table.

    Attributes:
        module: of mlx_lm.models.
        capability: "tree", "chain" or "none".
        equal: whether all texts were mlx_lm's, token for token; None if mlx_lm itself
            writes none here.
        reason: why the capability is not "tree", or the texts differ.
        layers: "attention", "windows", "states", or several of them.
        perfect: tokens per step with the drafter that knows the continuation.
    """

    module: str
    capability: str
    equal: bool | None
    reason: str = ""
    layers: str = ""
    perfect: float | None = None


def check(name: str) -> Outcome:
    """Makes a small instance of a module and compares its texts."""
    try:
        model = build(name)
        before = plain(model)
    except (Exception, SystemExit) as error:
        words = " ".join(str(error).split()) or "no text"
        return Outcome(name, NONE, None, f"mlx_lm itself does not decode with it here: {type(error).__name__} {words}")
    verifier = verifier_of(model)
    outcome = Outcome(name, verifier.capability, False, verifier.reason, kinds_of(model))
    texts = {"without a drafter": drafted(model, None)[0]}
    if verifier.capability != NONE:
        texts["with a random drafter"], _ = drafted(model, random_drafter(verifier.target))
        perfect = PerfectDrafter(verifier.target, PROMPT, before)
        texts["with a perfect drafter"], outcome.perfect = drafted(model, perfect)
    texts["by mlx_lm afterwards"] = plain(model)
    wrong = [way for way, text in texts.items() if text != before]
    outcome.equal = not wrong
    if wrong:
        outcome.reason = "; ".join(filter(None, [outcome.reason, f"another text {', '.join(wrong)}"]))
    return outcome


def plain(model: nn.Module) -> list[int]:
    """mlx_lm's own text."""
    return [int(token) for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=TOKENS)]


def drafted(model: nn.Module, drafter: RecurrentDrafter | None) -> tuple[list[int], float]:
    """Our text, and its tokens per step."""
    # Ids are all that counts: any tokenizer will do, as long as no token ends the text.
    tokenizer = load_tokenizer(EMBEDDED / "target")
    tokenizer.eos_token_ids = []
    responses = mlx_redrafter.stream_generate(model, tokenizer, PROMPT, drafter, max_tokens=TOKENS, shape=SHAPE)
    tokens, last = [], None
    for last in responses:
        tokens.append(last.token)
    return tokens[:TOKENS], getattr(last, "mean_acceptance_length", 1.0)


def kinds_of(model: nn.Module) -> str:
    """What kinds of layers a model has, by their caches."""
    found = leaves(make_prompt_cache(model))
    kinds = {
        "windows": any(isinstance(cache, RotatingKVCache) for cache in found),
        "states": any(isinstance(cache, ArraysCache) for cache in found),
        "attention": any(not isinstance(cache, (RotatingKVCache, ArraysCache)) for cache in found),
    }
    return ", ".join(sorted(kind for kind, there in kinds.items() if there))


def check_all(names: list[str]) -> Iterator[Outcome]:
    """Checks modules in processes of their own: where one ends, the table goes on."""
    left = list(names)
    while left:
        command = [sys.executable, "-m", "mlx_redrafter.benchmarks.architectures", "--worker", *left]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                if line.startswith("{"):
                    yield Outcome(**json.loads(line))
                    left.pop(0)
        if worker.returncode and left:
            yield Outcome(left.pop(0), NONE, None, f"the process ended with code {worker.returncode}")


def work(names: list[str]) -> None:
    """Checks modules and prints an outcome a line."""
    mx.disable_compile()  # on a CPU it calls a compiler for every new shape
    for name in names:
        print(json.dumps(dataclasses.asdict(check(name))), flush=True)


def summary(outcomes: list[Outcome]) -> str:
    """How many modules reach what."""
    decoding = [o for o in outcomes if o.equal is not None]
    if not decoding:
        return "No module decodes."
    attention = [o for o in decoding if "states" not in o.layers]
    drafting = sum(o.capability in (TREE, CHAIN) for o in decoding)
    trees = sum(o.capability == TREE for o in attention)
    equal = sum(bool(o.equal) for o in decoding)
    return (
        f"{len(outcomes)} modules, {len(decoding)} of which decode on the machine that made the table;"
        f" of those {drafting} can be drafted for ({drafting / len(decoding):.0%})."
        f" Of the {len(attention)} without states {trees} verify trees ({trees / max(1, len(attention)):.0%})."
        f" All texts were equal for {equal} of {len(decoding)}."
    )


def document(outcomes: list[Outcome]) -> str:
    """The table in Markdown."""
    lines = [
        "# Architectures",
        "",
        "Made by `python -m mlx_redrafter.benchmarks.architectures --out docs` with",
        f"mlx-lm {mlx_lm.__version__} and MLX {importlib.metadata.version('mlx')}; as data: "
        "[architectures.json](architectures.json).",
        "",
        summary(outcomes),
        "",
        "A small random float32 instance of each module wrote 64 tokens greedily. *equal*: the text was mlx_lm's,",
        "token for token, without a drafter, with a random one and with one that knows the continuation, and",
        "mlx_lm wrote the same with the model afterwards. Windows had 16 tokens, so that all wrapped.",
        "*tokens per step* is with the drafter that knows the continuation (at most 5 here).",
        "",
        "| module | capability | equal | layers | tokens per step | reason |",
        "|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        equal = {True: "yes", False: "no", None: "-"}[o.equal]
        perfect = "" if o.perfect is None else f"{o.perfect:.2f}"
        reason = o.reason.replace("|", "/")
        lines.append(f"| {o.module} | {o.capability} | {equal} | {o.layers} | {perfect} | {reason} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mlx_redrafter.benchmarks.architectures", description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="modules to check (default: all)")
    parser.add_argument("--out", type=pathlib.Path, help="directory for architectures.md and architectures.json")
    parser.add_argument("--worker", action="store_true", help="check here, and print one JSON object a line")
    args = parser.parse_args(argv)
    names = args.modules or modules()
    if args.worker:
        return work(names)
    outcomes = []
    for outcome in check_all(names):
        outcomes.append(outcome)
        print(f"{outcome.module:22} {outcome.capability:6} {outcome.equal!s:5} {outcome.reason}"[:200], flush=True)
    print(summary(outcomes))
    if args.out is not None:
        with replace_file(args.out / "architectures.json") as file:
            file.write_text(json.dumps([dataclasses.asdict(o) for o in outcomes], indent=1) + "\n")
        with replace_file(args.out / "architectures.md") as file:
            file.write_text(document(outcomes))


if __name__ == "__main__":
    main()
