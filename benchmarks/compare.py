"""Methods that draft, side by side on one target: mlx_lm's draft model, Medusa, ReDrafter, prompt lookup.

Every method that has settings first looks for its best on a few of the prompts; the best of
each then take turns on all prompts. With --out, compare.html is a page that needs no network.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

from mlx_redrafter.benchmarks import charts
from mlx_redrafter.benchmarks.contest import DRAFT_MODEL, Contest, Tried, open_contest, search
from mlx_redrafter.benchmarks.elsewhere import PUBLISHED
from mlx_redrafter.benchmarks.findings import at, equality, findings, title
from mlx_redrafter.benchmarks.html_page import page
from mlx_redrafter.benchmarks.methods import PLAIN
from mlx_redrafter.benchmarks.prompts import evenly
from mlx_redrafter.benchmarks.report import Report
from mlx_redrafter.benchmarks.rows import ALL, Row, as_data, row_id, rows_of
from mlx_redrafter.benchmarks.setup import (
    add_common_arguments,
    add_text_arguments,
    check_texts,
    encode_texts,
    in_range,
    load_pair,
)
from mlx_redrafter.benchmarks.side_by_side import side_by_side
from mlx_redrafter.benchmarks.tree_step import picture_of

from mlx_redrafter.drafting.redrafter import RecurrentDrafter
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.table import Table
from mlx_redrafter.system.weights import weights

HELP = "mlx_lm's draft model, Medusa, ReDrafter and lookup, each at its best, with a page to read"

NOTES = [
    "speed-up: plain mlx_lm's time per token over the method's, text by text; median, and quartiles in the JSON",
    "acceptance: mean acceptance length, tokens per step of the target; by position: share of steps that got at least"
    " so many draft tokens accepted",
    "tokens/s, speed-up and acceptance leave out the round that reads the prompt; first token: median seconds to it",
    "drafter: weights beside the target's; memory: weights of both, and the most that decoding held beside them",
    "equal: texts that are plain mlx_lm's, token for token; at a temperature all draw with noise keyed by position,"
    " mlx_lm's draft model, too, which agrees with the target more often so than with mlx_lm's own sampler",
    "ReDrafter auto: as generate runs it, which in every step chooses the drafter, lookup, both or neither",
    "each method takes part with the fastest of its settings on the prompts of the search; the clock is the same",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    add_text_arguments(parser)
    add = parser.add_argument
    add("--draft-model", metavar="DIR", help="mlx-lm model with the target's tokenizer, for mlx_lm's own drafting"
        " (left out if not given)")  # fmt: skip
    add("--medusa", metavar="DIR", help="Medusa heads for the target (left out if not given)")
    add("--temps", type=float, nargs="+", default=[0.0, 0.7, 1.0], help="temperatures (default: 0 0.7 1)")
    add("--seed", type=int, default=0, help="of the texts at a temperature (default: %(default)s)")
    add("--repeats", type=int, default=1, help="rounds per prompt (default: %(default)s)")
    add("--search-prompts", type=int, default=4, help="prompts on which each method looks for its best setting,"
        " at every temperature (default: %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> Report:
    prompts = check_texts(args)
    for flag, least in (("--repeats", 1), ("--search-prompts", 1)):
        in_range(flag, getattr(args, flag[2:].replace("-", "_")), least)
    for temp in args.temps:
        in_range("--temps", temp, 0)
        if not math.isfinite(temp):
            in_range("--temps", temp, 0, 100)
    pair = load_pair(args)
    if not isinstance(pair.drafter, RecurrentDrafter):
        raise UserError(f"--draft {args.draft}: is of Medusa heads, which --medusa takes; expected a recurrent drafter")
    contest = open_contest(pair, args.draft_model, args.medusa)
    texts = encode_texts(args, pair, prompts)
    categories = [prompt.category for prompt in prompts]
    rows: list[Row] = []
    tried: dict[float, list[Tried]] = {}
    for temp in dict.fromkeys(args.temps):
        found, tried[temp] = _at(temp, contest, args, texts, categories)
        rows += found
    step = picture_of(pair, evenly(texts, 4))
    tables = [_table(rows, temp, kind) for temp, kind in dict.fromkeys((row.temp, row.category) for row in rows)]
    tables += [_positions(rows, temp) for temp in tried] + [_settings(tried)] + [_published()]
    said = [sentence for sentence, _ in findings(rows)]
    data = {
        "rows": as_data(rows),
        "search": [
            {"id": row_id(temp, "search", f"{one.method} {one.setting}"), "temp": temp, **dataclasses.asdict(one)}
            for temp, all_ in tried.items()
            for one in all_
            if one.tokens_per_second
        ],
        "tree": None if step is None else dataclasses.asdict(step),
        "published": [
            {"id": f"published/{i}", "measured_here": False, **dataclasses.asdict(one)}
            for i, one in enumerate(PUBLISHED)
        ],
        "findings": said,
        "left_out": contest.missing,
    }

    def draw(figure: Any) -> None:
        temps = list(tried)
        axes = figure.subplots(1, len(temps), squeeze=False, sharex=True, sharey=True)[0]
        for one, temp in zip(axes, temps):
            _bars(one, [row for row in rows if row.temp == temp and row.category == ALL], at(temp))

    size = (2.0 + 4.0 * len(tried), 1.6 + 0.45 * len(contest.methods()))
    notes = [*contest.missing, *said, equality(rows), *NOTES]
    report = Report(
        "compare", "Drafting methods side by side", pair.facts, pair.command, tables, notes, data, draw, size
    )
    report.page = page(report, findings(rows), equality(rows), NOTES)
    return report


def _at(
    temp: float, contest: Contest, args: argparse.Namespace, texts: list[list[int]], categories: list[str]
) -> tuple[list[Row], list[Tried]]:
    """One temperature: the search, and then all at their best."""
    decoder = contest.pair.decoder(args.max_tokens, temp, args.seed)
    tried = search(contest, decoder, evenly(texts, args.search_prompts))
    best = {one.method: one.setting for one in tried if one.best}
    methods = {name: contest.method(decoder, name, setting) for name, setting in best.items()}
    runs = side_by_side(methods, texts, args.repeats)
    sizes = {name: contest.drafter_bytes(name) for name in best}
    return rows_of(temp, runs, categories, best, sizes, weights(contest.pair.model)[1]), tried


def _table(rows: list[Row], temp: float, kind: str) -> Table:
    columns = ["method", "setting", "tokens/s", "speed-up", "acceptance", "drafter MB", "memory MB", "first token s",
        "equal"]  # fmt: skip
    lines = [
        [
            title(row.method),
            row.setting,
            f"{row.tokens_per_second:.1f}",
            f"{row.speed_up:.2f}",
            f"{row.acceptance:.2f}",
            f"{row.drafter_bytes / 1e6:.1f}",
            f"{row.memory_bytes / 1e6:.1f}",
            f"{row.first_token:.3f}",
            f"{row.equal}/{row.runs}",
        ]
        for row in rows
        if (row.temp, row.category) == (temp, kind)
    ]
    return Table(f"{at(temp)}, {kind}", columns, lines)


def _positions(rows: list[Row], temp: float) -> Table:
    some = [row for row in rows if row.temp == temp and row.category == ALL and row.method != PLAIN]
    deepest = min(8, max(len(row.by_position) for row in some))
    lines = [[title(r.method), *(f"{share:.0%}" for share in _padded(r.by_position, deepest))] for r in some]
    return Table(f"{at(temp)}: steps with at least so many draft tokens accepted", ["method",
        *(str(d + 1) for d in range(deepest))], lines)  # fmt: skip


def _padded(shares: list[float], count: int) -> list[float]:
    return (shares + [0.0] * count)[:count]


def _settings(tried: dict[float, list[Tried]]) -> Table:
    lines = [
        [title(one.method), one.setting, at(temp), f"{one.tokens_per_second:.1f}", f"{one.acceptance:.2f}",
            "best" if one.best else ""]
        for temp, all_ in tried.items() for one in all_ if one.tokens_per_second
    ]  # fmt: skip
    return Table("The search for each method's best setting", ["method", "setting", "", "tokens/s", "acceptance", ""],
        lines, f"{title(DRAFT_MODEL)}: the setting is the number of draft tokens")  # fmt: skip


def _published() -> Table:
    lines = [[one.method, one.hardware, one.target, one.texts, f"{one.speed_up:.2f}",
        "" if one.acceptance is None else f"{one.acceptance:.2f}", one.source] for one in PUBLISHED]  # fmt: skip
    urls = ", ".join(sorted({one.url for one in PUBLISHED}))
    note = f"Their figures, on their hardware, against their own plain decoding: {urls}"
    return Table("Published elsewhere, not measured here", ["method", "hardware", "target", "texts", "speed-up",
        "tokens per step", "source"], lines, note)  # fmt: skip


def _bars(axes: Any, rows: list[Row], heading: str) -> None:
    """A bar per method with its quartiles."""
    for y, row in enumerate(rows):
        axes.barh(y, row.speed_up, color=charts.GREY if row.method == PLAIN else charts.COLOURS[0], height=0.6)
        axes.plot([row.speed_up_low, row.speed_up_high], [y, y], color="black", linewidth=1.2)
        axes.text(0.03, y, f"{row.speed_up:.2f}x", va="center", color="white", fontsize=9)
    axes.set_yticks(range(len(rows)), [title(row.method) for row in rows])
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    charts.plain_axes(axes, "speed-up over mlx_lm (median over texts)", "", heading)
