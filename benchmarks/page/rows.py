"""Makes a comparison's figures into rows: one for each method, temperature and kind of text.

Knows nothing of tables, sentences or pages.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Sequence

from mlx_redrafter.benchmarks.compare import Run, Runs, summarize

ALL = "all texts"


@dataclasses.dataclass
class Row:
    """One method on one kind of text at one temperature.

    Attributes:
        id: names the row; every figure of a report says which row it is from.
        temp: temperature; 0 is greedy.
        category: kind of text, or "all texts".
        method, setting: who, and with which of its settings.
        texts: how many.
        tokens_per_second: of all runs together, the prompts' reading left out.
        speed_up, speed_up_low, speed_up_high: plain mlx_lm's time per token over this
            method's, text by text; median and quartiles.
        acceptance: mean acceptance length, tokens per step.
        by_position: share of steps that got at least d draft tokens accepted, d = 1, 2, ...
        drafter_bytes: weights beside the target's.
        memory_bytes: weights of target and drafter, and the most that decoding held beside them.
        first_token: seconds until the first token, median.
        equal, runs: runs that wrote plain mlx_lm's text, of how many.
    """

    id: str
    temp: float
    category: str
    method: str
    setting: str
    texts: int
    tokens_per_second: float
    speed_up: float
    speed_up_low: float
    speed_up_high: float
    acceptance: float
    by_position: list[float]
    drafter_bytes: int
    memory_bytes: int
    first_token: float
    equal: int
    runs: int


def row_id(temp: float, category: str, method: str) -> str:
    """t0.7/all-texts/redrafter-auto"""
    words = (re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in (category, method))
    return "/".join([f"t{temp:g}", *words])


def rows_of(
    temp: float,
    runs: Runs,
    categories: Sequence[str],
    settings: dict[str, str],
    drafter_bytes: dict[str, int],
    target_bytes: int,
) -> list[Row]:
    """All rows of one temperature: all texts first, then each category where there are several.

    Args:
        runs: of every method, plain decoding first.
        categories: of each text.
        settings, drafter_bytes: of each method.
    """
    kinds = sorted(set(categories))
    found: list[Row] = []
    for kind in [ALL, *(kinds if len(kinds) > 1 else [])]:
        picked = [i for i, category in enumerate(categories) if kind in (ALL, category)]
        part = {name: [texts[i] for i in picked] for name, texts in runs.items()}
        for name, one in summarize(part).items():
            flat = [run for text in part[name] for run in text]
            held = target_bytes + drafter_bytes[name] + max(run.held for run in flat)
            first = statistics.median(run.to_first for run in flat)
            ratios = (one.speed_up.median, one.speed_up.low, one.speed_up.high, one.acceptance)
            who = (row_id(temp, kind, name), temp, kind, name, settings[name], len(picked))
            sizes = (drafter_bytes[name], held, first)
            found.append(Row(*who, one.tokens_per_second, *ratios, by_position(flat), *sizes, one.equal, one.runs))
    return found


def by_position(runs: Sequence[Run]) -> list[float]:
    """Share of all steps that got at least d draft tokens accepted, d = 1 up to the most there were."""
    steps = [count for run in runs for count in run.accepted]
    return [sum(count >= d for count in steps) / len(steps) for d in range(1, max(steps, default=0) + 1)]
