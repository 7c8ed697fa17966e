"""Measures the speed of ways to decode, side by side on the same prompts.

Every prompt is continued by every method in turn, in an order that rotates. Speed-up is
plain decoding's time per token over the method's on the same text, with mlx_lm's loop on the
same weights and layout; medians and quartiles are over the texts. The limit is what this
device would reach with the same acceptance if a step were its verified rows alone, no
drafting and no waiting: those rows are timed between the texts, behind a context of the
prompt and half of the text.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from mlx_redrafter.benchmarks import charts
from mlx_redrafter.benchmarks.compare import Runs, Summary, median_time, side_by_side, summarize
from mlx_redrafter.benchmarks.competitors import DEFAULTS, PLAIN, shape_named
from mlx_redrafter.benchmarks.flags import add_common_arguments, add_round_arguments, add_text_arguments, check_texts
from mlx_redrafter.benchmarks.pair import Pair, encode_texts, load_pair
from mlx_redrafter.benchmarks.report import Report
from mlx_redrafter.benchmarks.step_timing import Rows

from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.system.table import Table
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.text.flags import add_pipeline_argument

HELP = "plain decoding and ways to draft, side by side"

NOTES = [
    "speed-up: the time per token of plain decoding, by mlx_lm's loop on the same weights and layout, over the"
    " method's, text by text; median and quartiles (25 %, 75 %); as-loaded shows what the layout alone brings",
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
    parser.add_argument("--methods", nargs="+", default=list(DEFAULTS), metavar="METHOD", help="plain (mlx_lm's loop;"
        " always takes part), as-loaded (the same, weights in the layout that mlx_lm loads them in), ours (our loop"
        " without drafts), chain:N, beams:WxL:N, best-first:WxL:N, auto-no-lookup (the drafter's shapes alone),"
        f" auto (as generate does it) (default: {' '.join(DEFAULTS)})")  # fmt: skip
    add_round_arguments(parser, temps=[0.0])
    add_pipeline_argument(parser)


def run(args: argparse.Namespace) -> Report:
    prompts = check_texts(args)
    names = list(dict.fromkeys([PLAIN, *args.methods]))
    shapes = {name: shape for name in names if (shape := shape_named(name)) is not None}
    pair = load_pair(args)
    pair.check_shapes(shapes.values())
    if shapes:
        verifier_of(pair.model).checked()
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
            {"temp": temp, "methods": summaries, "limits": limits} for temp, (summaries, limits) in results.items()
        ],
        "categories": categories,
    }

    def draw(figure: Any) -> None:
        panels = {charts.at(temp): _bars(summaries, limits) for temp, (summaries, limits) in results.items()}
        charts.bars(figure, panels, "speed-up over plain (median over texts)", "limit: its rows alone")

    size = (1.5 + 5.0 * len(results), 2.0 + 0.55 * len(names))
    return Report("speed", "Speed-up over plain decoding", pair.facts, pair.command, tables, NOTES, data, draw, size)


def _at(
    temp: float,
    pair: Pair,
    args: argparse.Namespace,
    names: list[str],
    shapes: dict[str, DraftShape],
    texts: list[list[int]],
) -> tuple[dict[str, Summary], dict[str, Limit]]:
    """All methods at one temperature, and the time of their rows alone in between."""
    decoder, verifier = pair.decoder(pair.drafter, args.max_tokens, temp, args.seed), verifier_of(pair.model)
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


def _shown(name: str) -> str:
    return "plain (mlx_lm)" if name == PLAIN else name


def _table(temp: float, summaries: dict[str, Summary], limits: dict[str, Limit]) -> Table:
    def bound(name: str, form: Callable[[Limit], str]) -> str:
        return form(limits[name]) if name in limits else ""

    columns: dict[str, Callable[[tuple[str, Summary]], str]] = {
        "method": lambda row: _shown(row[0]),
        "tokens/s": lambda row: f"{row[1].tokens_per_second:.1f}",
        "speed-up": lambda row: f"{row[1].speed_up.median:.2f}",
        "25 %": lambda row: f"{row[1].speed_up.low:.2f}",
        "75 %": lambda row: f"{row[1].speed_up.high:.2f}",
        "acceptance": lambda row: f"{row[1].acceptance:.2f}",
        "efficiency": lambda row: f"{row[1].efficiency:.2f}",
        "limit": lambda row: bound(row[0], lambda limit: f"{limit.speed_up:.2f}"),
        "reached": lambda row: bound(row[0], lambda limit: f"{limit.reached:.0%}"),
        "equal": lambda row: f"{row[1].equal}/{row[1].runs}",
    }
    return Table.of(charts.at(temp), columns, summaries.items())


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
    return Table(f"{charts.at(temp)}: median speed-up by category", ["method", *kinds], rows)


def _bars(summaries: dict[str, Summary], limits: dict[str, Limit]) -> list[charts.Bar]:
    """A bar per method, its quartiles, and a mark where the rows alone would be."""
    allowed = {name: limit.speed_up for name, limit in limits.items()}
    return [
        charts.Bar(_shown(name), spread.median, spread.low, spread.high, name == PLAIN, allowed.get(name))
        for name, spread in ((name, one.speed_up) for name, one in summaries.items())
    ]
