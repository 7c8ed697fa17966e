"""Makes the table of what mlx-lm's model modules can be used for.

python -m mlx_redrafter.benchmarks.architectures [--out docs] [MODULE ...]

Knows nothing of how a module is checked. The table goes to architectures.md and architectures.json.
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

import mlx.core as mx
import mlx_lm
from mlx_redrafter.benchmarks.architectures.check import Outcome, check
from mlx_redrafter.benchmarks.architectures.small_models import modules

from mlx_redrafter.system.files import replace_file, write_json
from mlx_redrafter.system.table import Table
from mlx_redrafter.target.verification import CHAIN, NONE, TREE

INTRODUCTION = """\
# Architectures

Made by `python -m mlx_redrafter.benchmarks.architectures --out docs` with
mlx-lm {mlx_lm} and MLX {mlx}; as data: [architectures.json](architectures.json).

{summary}

A small random float32 instance of each module wrote 64 tokens greedily. *equal*: the text was mlx_lm's,
token for token, without a drafter, with a random one and with one that knows the continuation, and
mlx_lm wrote the same with the model afterwards. Windows had 16 tokens, so that all wrapped.
*tokens per step* is with the drafter that knows the continuation, whose place in it the last hidden state tells it
(at most 5 here); *taps* the same by the hidden states behind a quarter, a half and three quarters of the layers,
empty where these cannot be read.

{table}
"""


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


def _work(names: list[str]) -> None:
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
    taps = sum(o.taps is not None for o in decoding)
    return (
        f"{len(outcomes)} modules, {len(decoding)} of which decode on the machine that made the table;"
        f" of those {drafting} can be drafted for ({drafting / len(decoding):.0%})."
        f" Of the {len(attention)} without states {trees} verify trees ({trees / max(1, len(attention)):.0%})."
        f" All texts were equal for {equal} of {len(decoding)}."
        f" Heads can read hidden states between the layers of {taps} of the {drafting}."
    )


def document(outcomes: list[Outcome]) -> str:
    """The table in Markdown."""
    rows = [
        [o.module, o.capability, {True: "yes", False: "no", None: "-"}[o.equal], o.layers,
            *("" if steps is None else f"{steps:.2f}" for steps in (o.perfect, o.taps)), o.reason]
        for o in outcomes
    ]  # fmt: skip
    columns = ["module", "capability", "equal", "layers", "tokens per step", "taps", "reason"]
    table = Table("", columns, rows).markdown()
    versions = {"mlx": importlib.metadata.version("mlx"), "mlx_lm": mlx_lm.__version__}
    return INTRODUCTION.format(summary=summary(outcomes), table=table, **versions)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mlx_redrafter.benchmarks.architectures", description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="modules to check (default: all)")
    parser.add_argument("--out", type=pathlib.Path, help="directory for architectures.md and architectures.json")
    parser.add_argument("--worker", action="store_true", help="check here, and print one JSON object a line")
    args = parser.parse_args(argv)
    names = args.modules or modules()
    if args.worker:
        return _work(names)
    outcomes = []
    for outcome in check_all(names):
        outcomes.append(outcome)
        print(f"{outcome.module:22} {outcome.capability:6} {outcome.equal!s:5} {outcome.reason}"[:200], flush=True)
    print(summary(outcomes))
    if args.out is not None:
        write_json(args.out / "architectures.json", [dataclasses.asdict(o) for o in outcomes], indent=1)
        with replace_file(args.out / "architectures.md") as file:
            file.write_text(document(outcomes), "utf-8")


if __name__ == "__main__":
    main()
