"""Measures structured output with drafts over the same without.

Every text is written under its schema by four methods, which write the same one: plain decoding under masks, with
what the grammar forces drafted (jump-ahead), with the drafter's drafts, and with both. So the drafter's share and
jump-ahead's are told apart. Schema-heavy texts are records of short fields; free ones are one long string of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from typing import Any

from mlx_redrafter.benchmarks import charts
from mlx_redrafter.benchmarks.compare import Method, Summary, side_by_side, summarize
from mlx_redrafter.benchmarks.flags import add_common_arguments
from mlx_redrafter.benchmarks.pair import Pair, load_pair
from mlx_redrafter.benchmarks.prompts import Prompt, token_ids
from mlx_redrafter.benchmarks.report import Report

from mlx_redrafter.constraints.constraint import Constraint, json_schema
from mlx_redrafter.drafting.shape import AUTO, OFF
from mlx_redrafter.system.flag_types import whole
from mlx_redrafter.system.table import Table
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.text.generate import stream_generate
from mlx_redrafter.text.loading import is_embedded

HELP = "structured output with drafts over without"

METHODS = {  # name: with the drafter, with jump-ahead
    "plain under masks": (False, False),
    "jump-ahead": (False, True),
    "drafts": (True, False),
    "drafts and jump-ahead": (True, True),
}
NOTES = [
    "plain under masks: our loop without drafts, each token chosen among what the schema allows",
    "jump-ahead: what the grammar forces is drafted, no drafter; drafts: the drafter's and lookup's, pruned by it",
    "speed-up: plain's time per token over the method's, text by text; median and quartiles (25 %, 75 %)",
    "acceptance: mean acceptance length, tokens per step, all texts together",
    "equal: texts that are plain's, token for token",
]
SHORT, FLAG = {"type": "string", "maxLength": 24}, {"type": "boolean"}
NUMBER = {"type": "integer", "minimum": 0, "maximum": 9999}
DAY = {"type": "string", "pattern": "^20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])$"}


def _record(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


ADDRESS = _record(street=SHORT, postal_code={"type": "string", "pattern": "^[0-9]{5}$"}, city=SHORT, country=SHORT)
LINE = _record(description=SHORT, quantity=NUMBER, unit_price=NUMBER)
PARTS = {"type": "array", "items": {"enum": ["frontend", "backend", "database"]}, "maxItems": 2}
HEAVY = {
    "Extract the order: Anna Berg in Oslo bought two lamps and a chair on 3 May 2024, unpaid.": _record(
        customer_name=SHORT,
        billing_address=ADDRESS,
        order_date=DAY,
        order_lines={"type": "array", "items": LINE, "minItems": 2, "maxItems": 3},
        is_paid=FLAG,
    ),
    "Describe the flight from Paris to Rome on Monday as JSON.": _record(
        flight_number={"type": "string", "pattern": "^[A-Z]{2}[0-9]{3,4}$"},
        departure_airport=SHORT,
        arrival_airport=SHORT,
        departure_date=DAY,
        cabin_class={"enum": ["economy", "business", "first"]},
        seats_available=NUMBER,
        refundable=FLAG,
    ),
    "Write a weather report for Berlin as JSON.": _record(
        location=_record(city_name=SHORT, latitude=NUMBER, longitude=NUMBER),
        observation_date=DAY,
        temperature_celsius=NUMBER,
        humidity_percent=NUMBER,
        conditions={"enum": ["clear", "cloudy", "rain", "snow"]},
    ),
    "File a bug: the login page does not load on Firefox.": _record(
        issue_title=SHORT,
        issue_state={"enum": ["open", "closed"]},
        assigned_developer=SHORT,
        reported_by_customer=FLAG,
        affected_components=PARTS,
        priority_level={"enum": ["low", "medium", "high", "critical"]},
        estimated_hours=NUMBER,
    ),
}
FREE = {
    text: _record(text={"type": "string"})
    for text in ("Why is the sky blue?", "Tell me a story about a fox.", "How do I bake bread?", "What is a graph?")
}


@dataclasses.dataclass
class Task:
    """A prompt and what its text has to be."""

    ids: list[int]
    constraint: Constraint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    add = parser.add_argument
    add("--max-tokens", "-m", type=whole(2), default=160, help="tokens per text at most (default: %(default)s)")
    add("--repeats", type=whole(1), default=1, help="rounds per prompt (default: %(default)s)")
    add("--num-prompts", type=whole(1), default=4, help="so many of each kind, four at most (default: %(default)s)")


def run(args: argparse.Namespace) -> Report:
    kinds = {"schema-heavy": HEAVY, "free text in JSON": FREE}
    constraints = {kind: {text: json_schema(one) for text, one in texts.items()} for kind, texts in kinds.items()}
    pair = load_pair(args, baseline=False)
    verifier_of(pair.model).checked()
    methods = {name: _method(pair, args.max_tokens, *how) for name, how in METHODS.items()}
    results: dict[str, dict[str, Summary]] = {}
    for kind, texts in constraints.items():
        tasks = []
        for text, constraint in list(texts.items())[: args.num_prompts]:
            ids = token_ids(Prompt(text, kind, message=True), pair.tokenizer, None, not is_embedded(args.model))
            tasks.append(Task(ids, constraint))
        results[kind] = summarize(side_by_side(methods, tasks, args.repeats))
    pair.facts["texts"] = f"{len(tasks)} of each kind, at most {args.max_tokens} tokens, greedy"

    def draw(figure: Any) -> None:
        panels = {kind: _bars(summaries) for kind, summaries in results.items()}
        charts.bars(figure, panels, "speed-up over plain under masks (median over texts)")

    title, tables = "Structured output with drafts", [_table(kind, one) for kind, one in results.items()]
    return Report("structured", title, pair.facts, pair.command, tables, NOTES, {"kinds": results}, draw, (11.5, 3.5))


def _method(pair: Pair, max_tokens: int, with_drafter: bool, jump_ahead: bool) -> Method:
    def decode(task: Task) -> Iterable:
        return stream_generate(
            pair.model,
            pair.tokenizer,
            task.ids,
            pair.drafter if with_drafter else None,
            constraint=dataclasses.replace(task.constraint, jump_ahead=jump_ahead),
            max_tokens=max_tokens,
            lookup=AUTO if with_drafter else OFF,
        )

    return decode


def _table(kind: str, summaries: dict[str, Summary]) -> Table:
    columns = ["method", "tokens/s", "speed-up", "25 %", "75 %", "acceptance", "equal"]
    rows = [
        [
            name,
            f"{one.tokens_per_second:.1f}",
            *(f"{value:.2f}" for value in (one.speed_up.median, one.speed_up.low, one.speed_up.high, one.acceptance)),
            f"{one.equal}/{one.runs}",
        ]
        for name, one in summaries.items()
    ]
    return Table(kind, columns, rows)


def _bars(summaries: dict[str, Summary]) -> list[charts.Bar]:
    return [
        charts.Bar(name, one.speed_up.median, one.speed_up.low, one.speed_up.high, name == next(iter(summaries)))
        for name, one in summaries.items()
    ]
