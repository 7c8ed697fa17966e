"""Compares methods that draft on one target: a draft model in two loops, Medusa, EAGLE-3, ReDrafter and lookup.

Every method that has settings first looks for its best on a few of the prompts; the best of
each then take turns on all prompts. With --out, compare.html is a page that needs no network.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from mlx_redrafter.benchmarks import charts
from mlx_redrafter.benchmarks.compare import side_by_side, summarize
from mlx_redrafter.benchmarks.competitors import (
    DRAFT_MODEL,
    HEADS,
    PLAIN,
    SETTINGS,
    Contest,
    Decoder,
    flag_of,
    open_contest,
)
from mlx_redrafter.benchmarks.flags import add_common_arguments, add_round_arguments, add_text_arguments, check_texts
from mlx_redrafter.benchmarks.page.page import PUBLISHED, page
from mlx_redrafter.benchmarks.page.rows import ALL, Row, row_id, rows_of
from mlx_redrafter.benchmarks.page.tree_step import picture_of
from mlx_redrafter.benchmarks.page.verdicts import equality, findings, title
from mlx_redrafter.benchmarks.pair import encode_texts, load_pair
from mlx_redrafter.benchmarks.prompts import evenly
from mlx_redrafter.benchmarks.report import Report

from mlx_redrafter.drafting.redrafter import RecurrentDrafter
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.flag_types import whole
from mlx_redrafter.system.table import Table
from mlx_redrafter.system.weights import weights

HEADING = "Drafting methods side by side"
HELP = (
    "a draft model in mlx_lm's loop and in ours, Medusa, EAGLE-3, ReDrafter and lookup, each at its best, with a page"
    " to read"
)

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


@dataclasses.dataclass
class Tried:
    """One setting in the search for a method's best; without a speed where there was nothing to search."""

    id: str
    temp: float
    method: str
    setting: str
    tokens_per_second: float = 0.0
    acceptance: float = 0.0
    best: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    add_text_arguments(parser)
    add = parser.add_argument
    add("--draft-model", metavar="DIR", help="mlx-lm model with the target's tokenizer, for mlx_lm's own drafting"
        " and for ours (left out if not given)")  # fmt: skip
    for method in HEADS:
        add(flag_of(method), metavar="DIR", help=f"{method} heads for the target (left out if not given)")
    add_round_arguments(parser, temps=[0.0, 0.7, 1.0])
    add("--search-prompts", type=whole(1), default=4, help="prompts on which each method looks for its best setting,"
        " at every temperature (default: %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> Report:
    prompts = check_texts(args)
    pair = load_pair(args)
    if not isinstance(pair.drafter, RecurrentDrafter):
        raise UserError(
            f"--draft {args.draft}: is no recurrent drafter; {' and '.join(map(flag_of, HEADS))} take heads,"
            " --draft-model takes a model,"
            f" and `mlx-redrafter bench speed --draft {args.draft}` measures any drafter beside plain decoding"
        )
    heads = {method: getattr(args, flag_of(method).removeprefix("--")) for method in HEADS}
    contest = open_contest(pair.model, pair.tokenizer, pair.drafter, args.draft_model, heads)
    pair.facts |= contest.facts
    texts = encode_texts(args, pair, prompts)
    categories = [prompt.category for prompt in prompts]
    temps = list(dict.fromkeys(args.temps))
    rows: list[Row] = []
    tried: list[Tried] = []
    for temp in temps:
        decoder = pair.decoder(pair.drafter, args.max_tokens, temp, args.seed)
        found = search(contest, decoder, evenly(texts, args.search_prompts))
        best = {one.method: one.setting for one in found if one.best}
        methods = {name: contest.method(decoder, name, setting) for name, setting in best.items()}
        sizes = {name: contest.drafter_bytes(name) for name in best}
        runs = side_by_side(methods, texts, args.repeats)
        rows += rows_of(temp, runs, categories, best, sizes, weights(pair.model)[1])
        tried += [one for one in found if one.tokens_per_second]
    data: dict[str, Any] = {
        "rows": rows,
        "search": tried,
        "tree": picture_of(pair.model, pair.drafter, pair.tokenizer, evenly(texts, 4)),
        "published": PUBLISHED,
        "findings": [sentence for sentence, _ in findings(rows)],
        "left_out": contest.missing,
    }
    tables = [_table(rows, temp, kind) for temp, kind in dict.fromkeys((row.temp, row.category) for row in rows)]
    tables += [_positions(rows, temp) for temp in temps] + [_settings(tried), _published()]

    def draw(figure: Any) -> None:
        panels = {charts.at(temp): _bars(rows, temp) for temp in temps}
        charts.bars(figure, panels, "speed-up over plain (median over texts)")

    size = (2.0 + 4.0 * len(temps), 1.6 + 0.45 * len(contest.methods()))
    notes = [*contest.missing, *data["findings"], equality(rows), *NOTES]
    return Report("compare", HEADING, pair.facts, pair.command, tables, notes, data, draw, size,
        lambda found: page(found, HEADING, NOTES))  # fmt: skip


def search(contest: Contest, decoder: Decoder, texts: list[list[int]]) -> list[Tried]:
    """Every setting of every method that has a choice, side by side on a few prompts.

    Returns:
        all that were tried; of each method the fastest is marked.
    """
    tried: list[Tried] = []
    for name in contest.methods():
        found = [
            Tried(row_id(decoder.temp, "search", f"{name} {setting}"), decoder.temp, name, setting)
            for setting in SETTINGS[name]
        ]
        if len(found) > 1:
            methods = {one.setting: contest.method(decoder, name, one.setting) for one in found}
            for one, summary in zip(found, summarize(side_by_side(methods, texts)).values(), strict=True):
                one.tokens_per_second, one.acceptance = summary.tokens_per_second, summary.acceptance
        max(found, key=lambda one: one.tokens_per_second).best = True
        tried += found
    return tried


COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: title(row.method),
    "setting": lambda row: row.setting,
    "tokens/s": lambda row: f"{row.tokens_per_second:.1f}",
    "speed-up": lambda row: f"{row.speed_up:.2f}",
    "acceptance": lambda row: f"{row.acceptance:.2f}",
    "drafter MB": lambda row: f"{row.drafter_bytes / 1e6:.1f}",
    "memory MB": lambda row: f"{row.memory_bytes / 1e6:.1f}",
    "first token s": lambda row: f"{row.first_token:.3f}",
    "equal": lambda row: f"{row.equal}/{row.runs}",
}


def _table(rows: list[Row], temp: float, kind: str) -> Table:
    some = [row for row in rows if (row.temp, row.category) == (temp, kind)]
    return Table.of(f"{charts.at(temp)}, {kind}", COLUMNS, some)


def _positions(rows: list[Row], temp: float) -> Table:
    some = [row for row in rows if row.temp == temp and row.category == ALL and row.method != PLAIN]
    deepest = min(8, max(len(row.by_position) for row in some))
    lines = [[title(r.method), *(f"{s:.0%}" for s in (r.by_position + [0.0] * deepest)[:deepest])] for r in some]
    heading = f"{charts.at(temp)}: steps with at least so many draft tokens accepted"
    return Table(heading, ["method", *(str(d + 1) for d in range(deepest))], lines)


def _settings(tried: list[Tried]) -> Table:
    lines = [
        [title(one.method), one.setting, charts.at(one.temp), f"{one.tokens_per_second:.1f}", f"{one.acceptance:.2f}",
            "best" if one.best else ""]
        for one in tried
    ]  # fmt: skip
    note = f"{title(DRAFT_MODEL)}: the setting is the number of draft tokens"
    columns = ["method", "setting", "", "tokens/s", "acceptance", ""]
    return Table("The search for each method's best setting", columns, lines, note)


def _published() -> Table:
    words = ("method", "hardware", "target", "texts")
    lines = [
        [*(one[word] for word in words), f"{one['speed_up']:.2f}",
            "" if one["acceptance"] is None else f"{one['acceptance']:.2f}", one["source"]]
        for one in PUBLISHED
    ]  # fmt: skip
    urls = ", ".join(sorted({one["url"] for one in PUBLISHED}))
    note = f"Their figures, on their hardware, against their own plain decoding: {urls}"
    columns = [*words, "speed-up", "tokens per step", "source"]
    return Table("Published elsewhere, not measured here", columns, lines, note)


def _bars(rows: list[Row], temp: float) -> list[charts.Bar]:
    return [
        charts.Bar(title(row.method), row.speed_up, row.speed_up_low, row.speed_up_high, row.method == PLAIN)
        for row in rows
        if row.temp == temp and row.category == ALL
    ]
