"""Runs `mlx-redrafter bench KIND`; knows nothing of any kind but its name."""

from __future__ import annotations

import argparse

from mlx_redrafter.benchmarks.kinds import (
    ablation,
    batch,
    breakdown,
    compare_methods,
    context,
    served,
    speed,
    structured,
    sweep,
    verify_cost,
)

HELP = (
    "measure on this device: speed, other methods, tree shapes, cost of rows, parts of a step, long contexts,"
    " choices in training, the server, structured output, many texts at once"
)

# Name: module with HELP, add_arguments(parser) and run(args), which returns a Report.
KINDS = {
    "speed": speed,
    "compare": compare_methods,
    "sweep": sweep,
    "verify-cost": verify_cost,
    "breakdown": breakdown,
    "context": context,
    "ablation": ablation,
    "serve": served,
    "structured": structured,
    "batch": batch,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, module in KINDS.items():
        child = kinds.add_parser(name, help=module.HELP, description=module.__doc__)
        child.formatter_class = argparse.RawDescriptionHelpFormatter
        module.add_arguments(child)


def run(args: argparse.Namespace) -> None:
    KINDS[args.kind].run(args).publish(args.out)
