"""Measures the time of verifying 1 to 32 rows, against context length and the target's cost.

Rows alone: no drafting, no acceptance, graphs built before the clock starts. All numbers
of rows take turns, in an order that rotates, behind the same context. The cost of M rows
relative to one row is what decides how much to draft.
"""

from __future__ import annotations

import argparse
from typing import Any

from mlx_redrafter.benchmarks import charts
from mlx_redrafter.benchmarks.compare import Spread, turn_order
from mlx_redrafter.benchmarks.flags import SCALE, add_out_argument
from mlx_redrafter.benchmarks.long_context import long_text
from mlx_redrafter.benchmarks.pair import Loaded, load_scaled
from mlx_redrafter.benchmarks.report import Report, check_out
from mlx_redrafter.benchmarks.step_timing import Rows
from tqdm import tqdm

from mlx_redrafter.system.flag_types import real, whole
from mlx_redrafter.system.table import Table
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.text.flags import add_pair_arguments

HELP = "time of verifying 1 to 32 rows, against context length and cost of the target"

ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
NOTES = [
    "ms: time of one verification, median; its quartiles are in the JSON",
    "x: over the time of one row at the same context and cost",
]

Measured = dict[tuple[float, int], dict[int, Spread]]  # (scale, context): by rows, in seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pair_arguments(parser, drafter=False)
    add = parser.add_argument
    add("--cost-scales", type=real(1, 1000), nargs="+", default=[1.0], metavar="X", help=f"{SCALE} (default: 1)")
    add("--verify-rows", type=whole(1, 256), nargs="+", default=list(ROWS), metavar="M",
        help=f"rows in one pass (default: {' '.join(map(str, ROWS))})")  # fmt: skip
    add("--contexts", type=whole(1, 2**20), nargs="+", default=[128, 1024], metavar="TOKENS",
        help="lengths to read (default: 128 1024)")  # fmt: skip
    add("--repeats", type=whole(1), default=15, help="rounds (default: %(default)s)")
    add_out_argument(parser)


def run(args: argparse.Namespace) -> Report:
    check_out(args.out)
    rows, contexts = sorted({1, *args.verify_rows}), sorted(set(args.contexts))
    measured: Measured = {}
    facts: dict[str, str] = {}
    for scale in sorted(set(args.cost_scales)):
        loaded = load_scaled(args, scale)
        verifier_of(loaded.model).checked()
        facts = facts or loaded.facts
        for context in contexts:
            measured[loaded.cost_scale, context] = _measure(loaded, context, rows, args.repeats)
    scales = list(dict.fromkeys(scale for scale, _ in measured))
    facts |= {"cost scales": ", ".join(f"{scale:.3g}" for scale in scales), "rounds": str(args.repeats)}

    def draw(figure: Any) -> None:
        axes = figure.subplots(2, len(scales), squeeze=False)
        for column, scale in enumerate(scales):
            name = f"target's cost x {scale:.3g}" if scale > 1 else "target as it is"
            _lines(axes[0][column], measured, scale, relative=False, title=name)
            _lines(axes[1][column], measured, scale, relative=True, title="")

    data = {
        "measured": [
            {"cost_scale": scale, "context": context, "rows": count, "seconds": spread}
            for (scale, context), spreads in measured.items()
            for count, spread in spreads.items()
        ]
    }
    title, size = "Cost of verifying rows", (1.5 + 4.5 * len(scales), 7.0)
    return Report("verify-cost", title, facts, loaded.command, _tables(measured, rows), NOTES, data, draw, size)


def _measure(loaded: Loaded, context: int, rows: list[int], repeats: int) -> dict[int, Spread]:
    """Seconds of one verification by rows; they take turns."""
    behind = Rows(verifier_of(loaded.model), long_text(loaded.tokenizer, context))
    for count in rows:
        behind.seconds(count)
    times: dict[int, list[float]] = {count: [] for count in rows}
    description = f"rows behind {context} tokens"
    for turn in tqdm(range(repeats), desc=description, unit="round", leave=False):
        for count in turn_order(rows, turn):
            times[count].append(behind.seconds(count))
    return {count: Spread.of(seconds) for count, seconds in times.items()}


def _tables(measured: Measured, rows: list[int]) -> list[Table]:
    columns, lines = ["rows"], [[str(count)] for count in rows]
    for (scale, context), spreads in measured.items():
        columns += [f"ms, {context} tokens" + (f", cost x {scale:.3g}" if scale > 1 else ""), "x"]
        for line, count in zip(lines, rows):
            time = spreads[count].median
            line += [f"{1e3 * time:.2f}", f"{time / spreads[1].median:.2f}"]
    return [Table("time of one verification", columns, lines)]


def _lines(axes: Any, measured: Measured, scale: float, relative: bool, title: str) -> None:
    series = {}
    for (at, context), spreads in measured.items():
        if at == scale:
            unit = spreads[1].median if relative else 1e-3
            series[f"{context} tokens of context"] = [(m, s.median / unit) for m, s in spreads.items()]
            if not relative:
                low, high = ([1e3 * getattr(s, end) for s in spreads.values()] for end in ("low", "high"))
                axes.fill_between(list(spreads), low, high, color="#cccccc", linewidth=0)
    charts.lines(axes, series)
    label = "time over one row's (x)" if relative else "time (ms); grey: quartiles"
    charts.plain_axes(axes, "rows verified in one pass", label, title)
    axes.set_ylim(bottom=0)
