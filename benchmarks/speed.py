"""Speed of ways to decode, side by side on the same prompts.

Every prompt is continued by every method in turn, in an order that rotates. Speed-up is
mlx_lm's time per token over the method's on the same text; medians and quartiles are over
the texts. The limit is what this device would reach with the same acceptance if a step were
its verified rows alone, no drafting and no waiting: those rows are timed between the texts,
behind a context of the prompt and half of the text.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from typing import Any

from mlx_redrafter.benchmarks import charts
from mlx_redrafter.benchmarks.methods import DEFAULTS, PLAIN, shape_named
from mlx_redrafter.benchmarks.report import Report
from mlx_redrafter.benchmarks.setup import (
    Pair,
    add_common_arguments,
    add_text_arguments,
    check_texts,
    encode_texts,
    in_range,
    load_pair,
)
from mlx_redrafter.benchmarks.side_by_side import Runs, Summary, median_time, side_by_side, summarize
from mlx_redrafter.benchmarks.stages import Rows, require_verification

from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.system.table import Table
from mlx_redrafter.target.probe import verifier_of

HELP = "plain decoding and ways to draft, side by side"

NOTES = [
    "speed-up: mlx_lm's time per token over the method's, text by text; median and quartiles (25 %, 75 %)",
    "acceptance: mean acceptance length, tokens per step, all texts together",
    "efficiency: speed-up over the mean acceptance length of the same text, median",
    "limit: the speed-up if a step were its rows alone, no drafting, no waiting, median; reached: share of it",
    "equal: texts that are mlx_lm's, token for token (at a temperature mlx_lm draws with the same keyed noise)",
]


@dataclasses.dataclass
class Limit:
    """What the verified rows alone would allow: speed-up by text, and the share of it that was reached."""

    speed_up: float
    reached: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    add_text_arguments(parser)
    add = parser.add_argument
    add("--methods", nargs="+", default=list(DEFAULTS), metavar="METHOD", help="plain-packed (mlx_lm's loop, weights"
        " laid out for OpenBLAS as ours are), ours (our loop without drafts),"
        " chain:N, beams:WxL:N, best-first:WxL:N, auto-no-lookup (the drafter's shapes alone), auto (as generate does"
        " it); plain (mlx_lm) always comes first"
        f" (default: {' '.join(DEFAULTS)})")  # fmt: skip
    add("--temps", type=float, nargs="+", default=[0.0], help="temperatures, one after the other (default: 0)")
    add("--seed", type=int, default=0, help="of the texts at a temperature (default: %(default)s)")
    add("--repeats", type=int, default=1, help="rounds per prompt (default: %(default)s)")


def run(args: argparse.Namespace) -> Report:
    prompts = check_texts(args)
    in_range("--repeats", args.repeats, 1)
    for temp in args.temps:
        in_range("--temps", temp, 0)
    names = list(dict.fromkeys([PLAIN, *args.methods]))
    shapes = {name: shape for name in names if (shape := shape_named(name)) is not None}
    pair = load_pair(args)
    for shape in shapes.values():
        shape.check(pair.drafter.config.vocab_size)
    texts = encode_texts(args, pair, prompts)
    results = {temp: _at(temp, pair, args, names, shapes, texts) for temp in args.temps}
    categories = [prompt.category for prompt in prompts]
    tables = [_table(temp, summaries, limits) for temp, (summaries, limits) in results.items()]
    tables += [
        _by_category(temp, summaries, categories)
        for temp, (summaries, _) in results.items()
        if len(set(categories)) > 1
    ]
    data = {
        "temperatures": [
            {
                "temp": temp,
                "methods": {name: dataclasses.asdict(summary) for name, summary in summaries.items()},
                "limits": {name: dataclasses.asdict(limit) for name, limit in limits.items()},
            }
            for temp, (summaries, limits) in results.items()
        ],
        "categories": categories,
    }

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(results), squeeze=False, sharex=True, sharey=True)[0]
        for one, (temp, (summaries, limits)) in zip(axes, results.items()):
            _bars(one, _heading(temp), summaries, limits)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)

    size = (1.5 + 5.0 * len(results), 2.0 + 0.55 * len(names))
    return Report("speed", "Speed-up over mlx_lm", pair.facts, pair.command, tables, NOTES, data, draw, size)


def _at(
    temp: float,
    pair: Pair,
    args: argparse.Namespace,
    names: list[str],
    shapes: dict[str, DraftShape],
    texts: list[list[int]],
) -> tuple[dict[str, Summary], dict[str, Limit]]:
    """All methods at one temperature, and the time of their rows alone in between."""
    decoder, verifier = pair.decoder(args.max_tokens, temp, args.seed), verifier_of(pair.model)
    if shapes:
        require_verification(verifier)
    counts = sorted({1 + shape.num_draft_tokens for shape in shapes.values()})
    row_times: list[dict[int, float]] = []  # by round

    def time_rows(prompt: list[int]) -> None:
        behind = Rows(verifier, prompt + [prompt[-1]] * (args.max_tokens // 2))
        times = [{rows: behind.seconds(rows) for rows in counts} for _ in range(3)]
        row_times.append({rows: statistics.median(one[rows] for one in times) for rows in counts})

    methods = {name: decoder.method(name) for name in names}
    runs = side_by_side(methods, texts, args.repeats, after=time_rows if shapes else None)
    summaries = summarize(runs)
    limits = {}
    for name, shape in shapes.items():
        by_round = [times[1 + shape.num_draft_tokens] for times in row_times]
        rows = [statistics.median(by_round[i : i + args.repeats]) for i in range(0, len(by_round), args.repeats)]
        limits[name] = _limit(runs, name, summaries[name], rows)
    return summaries, limits


def _limit(runs: Runs, name: str, summary: Summary, row_seconds: list[float]) -> Limit:
    """From each text's own acceptance and plain time, and its rows' time."""
    possible, reached = [], []
    for i, speed_up in enumerate(summary.speed_ups):
        if speed_up is not None:
            best = runs[name][i][0].acceptance * median_time(runs[PLAIN][i]) / row_seconds[i]
            possible.append(best)
            reached.append(speed_up / best)
    return Limit(statistics.median(possible), statistics.median(reached))


def _heading(temp: float) -> str:
    return f"temperature {temp:g}" if temp else "greedy"


def _table(temp: float, summaries: dict[str, Summary], limits: dict[str, Limit]) -> Table:
    columns = [
        "method",
        "tokens/s",
        "speed-up",
        "25 %",
        "75 %",
        "acceptance",
        "efficiency",
        "limit",
        "reached",
        "equal",
    ]
    rows = []
    for name, one in summaries.items():
        limit = limits.get(name)
        rows.append(
            [
                "plain (mlx_lm)" if name == PLAIN else name,
                f"{one.tokens_per_second:.1f}",
                *(f"{value:.2f}" for value in (one.speed_up.median, one.speed_up.low, one.speed_up.high)),
                f"{one.acceptance:.2f}",
                f"{one.efficiency:.2f}",
                f"{limit.speed_up:.2f}" if limit else "",
                f"{limit.reached:.0%}" if limit else "",
                f"{one.equal}/{one.runs}",
            ]
        )
    return Table(_heading(temp), columns, rows)


def _by_category(temp: float, summaries: dict[str, Summary], categories: list[str]) -> Table:
    """Median speed-up of each kind of prompt."""
    kinds = sorted(set(categories))
    rows = []
    for name, one in summaries.items():
        cells = []
        for kind in kinds:
            values = [v for v, category in zip(one.speed_ups, categories) if category == kind and v is not None]
            cells.append(f"{statistics.median(values):.2f}" if values else "")
        rows.append([name, *cells])
    return Table(f"{_heading(temp)}: median speed-up by category", ["method", *kinds], rows)


def _bars(axes: Any, heading: str, summaries: dict[str, Summary], limits: dict[str, Limit]) -> None:
    """A bar per method, its quartiles, and a mark where the rows alone would be."""
    for y, (name, one) in enumerate(summaries.items()):
        spread = one.speed_up
        axes.barh(y, spread.median, color=charts.GREY if name == PLAIN else charts.COLOURS[0], height=0.6)
        axes.plot(
            [spread.low, spread.high], [y, y], color="black", linewidth=1.2, label="quartiles" if y == 0 else None
        )
        if limit := limits.get(name):
            first = name == next(iter(limits))
            axes.plot([limit.speed_up] * 2, [y - 0.38, y + 0.38], color=charts.COLOURS[3], linewidth=2.5,
                label="limit: its rows alone" if first else None)  # fmt: skip
        axes.text(0.03, y, f"{spread.median:.2f}x", va="center", color="white", fontsize=9)
    axes.set_yticks(range(len(summaries)), ["plain (mlx_lm)" if name == PLAIN else name for name in summaries])
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    charts.plain_axes(axes, "speed-up over mlx_lm (median over texts)", "", heading)
