"""Measures where the time of a step goes: draft, verify, accept and commit, and what the host adds.

The same greedy steps of the same texts are run in three ways, text by text: as the real
loop runs them; with every graph built before the clock starts, which leaves the device's
own time; and with a barrier behind each stage. The host's visible time is the first less
the second: the device had nothing to do. The stages' times include what a barrier costs,
so their sum is more than a step.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

from mlx_redrafter.benchmarks import charts
from mlx_redrafter.benchmarks.compare import Spread, turn_order
from mlx_redrafter.benchmarks.competitors import CHAIN_OF_3, TREE_OF_7, shape_named
from mlx_redrafter.benchmarks.flags import add_common_arguments, add_text_arguments, check_texts
from mlx_redrafter.benchmarks.long_context import never_end
from mlx_redrafter.benchmarks.pair import Pair, encode_texts, load_pair
from mlx_redrafter.benchmarks.report import Report
from mlx_redrafter.benchmarks.step_timing import STAGES, begin, device_times, stages, step_times
from tqdm import tqdm

from mlx_redrafter.drafting.shape import Drafted, DraftShape
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.table import Table
from mlx_redrafter.target.probe import verifier_of

HELP = "time of each part of a step, and of the host between steps"

WHOLE, DEVICE, VISIBLE, BUILDING = "whole step", "device alone", "host, visible", "host, building the graph"
PARTS = ("built", "run")
NOTES = [
    "whole step: from one step's tokens to the next one's, as stream_generate runs it",
    "device alone: the same steps, graphs built before the clock starts, submitted one behind the other",
    "host, visible: whole step less device alone, text by text; the device was idle. Below zero: not measurable",
    "host, building the graph: what there is to hide",
    "stages: each behind a barrier of its own; built: its graph on the host, run: submitted and waited for",
    "all: median of the texts' medians, with quartiles over the texts",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    add_text_arguments(parser, prompts=8, max_tokens=64)
    parser.add_argument("--methods", nargs="+", default=[CHAIN_OF_3, TREE_OF_7], metavar="METHOD",
        help=f"chain:N, beams:WxL:N, best-first:WxL:N (default: {CHAIN_OF_3} {TREE_OF_7})")  # fmt: skip


def run(args: argparse.Namespace) -> Report:
    prompts = check_texts(args)
    shapes = {name: _drafting(name) for name in dict.fromkeys(args.methods)}
    pair = load_pair(args)
    pair.check_shapes(shapes.values())
    texts = encode_texts(args, pair, prompts)
    verifier_of(pair.model).checked()
    never_end(pair.tokenizer)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in shapes}
    for shape in shapes.values():
        _measure(pair, shape, texts[0], args.max_tokens)  # warms up
    names = list(shapes)
    for turn, text in enumerate(tqdm(texts, desc="measuring", unit="text", leave=False)):
        for name in turn_order(names, turn):
            samples[name].append(_measure(pair, shapes[name], text, args.max_tokens))
    found = {name: {part: Spread.of([one[part] for one in each]) for part in each[0]} for name, each in samples.items()}

    def draw(figure: Any) -> None:
        _bars(figure.subplots(), found)

    size = (9.0, 2.2 + 1.1 * len(shapes))
    title, data = "Where the time of a step goes", {"seconds_per_step": found}
    return Report("breakdown", title, pair.facts, pair.command, _tables(found), NOTES, data, draw, size)


def _measure(pair: Pair, shape: DraftShape, text: list[int], max_tokens: int) -> dict[str, float]:
    """Median seconds per step of every part, for one text."""
    verifier = verifier_of(pair.model)
    whole = step_times(pair.decoder(pair.drafter, max_tokens).drafted(shape)(text))
    steps = len(whole) + 2
    device, building = device_times(*begin(verifier, pair.drafter, text), Drafted(shape), steps)
    times = {WHOLE: median(whole), DEVICE: median(device), BUILDING: median(building)}
    times[VISIBLE] = times[WHOLE] - times[DEVICE]
    barriers = stages(*begin(verifier, pair.drafter, text), Drafted(shape), steps)
    for stage in STAGES:
        for i, part in enumerate(PARTS):
            times[f"{stage}, {part}"] = median([one[stage][i] for one in barriers])
    return times


def _drafting(name: str) -> DraftShape:
    shape = shape_named(name)
    if shape is None:
        raise UserError(f"--methods {name}: has no fixed shape of drafts, so its steps have no parts to name")
    return shape


def _tables(found: dict[str, dict[str, Spread]]) -> list[Table]:
    steps, parts = [], []
    for name, times in found.items():
        share = times[VISIBLE].median / times[WHOLE].median
        cells = [f"{_ms(times[part])} ({_ends(times[part])})" for part in (WHOLE, DEVICE, VISIBLE, BUILDING)]
        steps.append([name, *cells, f"{share:.1%}"])
        for stage in STAGES:
            built, done = (times[f"{stage}, {part}"] for part in PARTS)
            parts.append([f"{name}: {stage}", _ms(built), _ms(done), f"{_ends(done)}"])
    heads = [f"{part}, ms" for part in (WHOLE, DEVICE, VISIBLE, BUILDING)]
    return [
        Table("a step", ["method", *heads, "visible share"], steps),
        Table("its stages behind barriers", ["stage", "built, ms", "run, ms", "quartiles"], parts),
    ]


def _ms(spread: Spread) -> str:
    return f"{1e3 * spread.median:.2f}"


def _ends(spread: Spread) -> str:
    return f"{1e3 * spread.low:.2f} to {1e3 * spread.high:.2f}"


def _bars(axes: Any, found: dict[str, dict[str, Spread]]) -> None:
    """Per method: the whole step as device and visible host time, and below it the stages behind barriers."""
    parts = [(f"{stage}, run behind a barrier", f"{stage}, run", i) for i, stage in enumerate(STAGES)]
    ticks: dict[float, str] = {}
    for row, (name, times) in enumerate(found.items()):
        top, below = 2.4 * row, 2.4 * row + 0.9
        first = row == 0
        device = 1e3 * min(times[DEVICE].median, times[WHOLE].median)
        visible = 1e3 * times[WHOLE].median - device
        axes.barh(top, device, color=charts.GREY, height=0.8, label=DEVICE if first else None)
        axes.barh(top, visible, left=device, color=charts.COLOURS[3], height=0.8, label=VISIBLE if first else None)
        left = 0.0
        for label, part, colour in parts:
            width = 1e3 * times[part].median
            axes.barh(below, width, left=left, color=charts.COLOURS[colour], height=0.8, label=label if first else None)
            left += width
        ticks |= {top: f"{name}: as it runs", below: f"{name}: behind barriers"}
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.invert_yaxis()
    charts.plain_axes(axes, "time per step (ms, median over texts)", "")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
