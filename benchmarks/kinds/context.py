"""Measures speed and memory with long contexts, and whether a step's time grows with the cache's capacity.

Every method reads a text of each length and goes on from it. Memory is MLX's own count of
what it holds, at its peak while the tokens after the first were made, beside what has to be
there: the target's and the drafter's weights and one cache. The embedded
target learned sequences of 512 and its config says 2,048; beyond them its text means
nothing, but its speed and memory are those of any text.

Capacity: the same short text is continued from caches with room for more and more tokens. Windows
and recurrent states have no such room, so there it changes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
from mlx_redrafter.benchmarks import charts
from mlx_redrafter.benchmarks.compare import Spread, turn_order
from mlx_redrafter.benchmarks.competitors import CHAIN_OF_3, PLAIN, TREE_OF_7, drafts, shape_named
from mlx_redrafter.benchmarks.flags import add_common_arguments
from mlx_redrafter.benchmarks.long_context import cache_bytes, lift_context, long_text, never_end, roomy_cache
from mlx_redrafter.benchmarks.pair import Pair, load_pair
from mlx_redrafter.benchmarks.report import Report
from mlx_redrafter.benchmarks.step_timing import step_times
from tqdm import tqdm

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.flag_types import whole
from mlx_redrafter.system.table import Table
from mlx_redrafter.system.weights import weights
from mlx_redrafter.target.probe import verifier_of

HELP = "speed and memory up to 16k tokens, and the cost of a roomy cache"

DEFAULTS = (PLAIN, CHAIN_OF_3, TREE_OF_7)
MOST = 2**20  # tokens
NOTES = [
    "reading: tokens per second until the first token; step: median time from one step's tokens to the next one's",
    "needed: weights of target and drafter (both are loaded throughout), and one cache of all tokens",
    "peak: the most that MLX held while decoding, behind the first token",
]
CAPACITY_NOTE = "ms per step of a text of {} tokens, median of the rounds' medians; the room is that of the buffers"


@dataclasses.dataclass
class Reading:
    """One method behind one context; times in seconds, memory in bytes."""

    tokens: int
    method: str
    reading_seconds: float
    step_seconds: float
    tokens_per_second: float
    peak_bytes: int
    needed_bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    add = parser.add_argument
    add("--contexts", type=whole(2, MOST), nargs="+", default=[512, 2048, 8192, 16384], metavar="TOKENS",
        help="lengths to read (default: 512 2048 8192 16384)")  # fmt: skip
    add("--capacities", type=whole(1, MOST), nargs="+", default=[1024, 4096, 16384], metavar="TOKENS",
        help="room of the caches for the second table (default: 1024 4096 16384)")  # fmt: skip
    add("--methods", nargs="+", default=list(DEFAULTS), metavar="METHOD", help="plain (mlx_lm), ours, chain:N,"
        f" beams:WxL:N, best-first:WxL:N (default: {' '.join(DEFAULTS)})")  # fmt: skip
    add("--max-tokens", "-m", type=whole(8), default=64, help="tokens after each text (default: %(default)s)")
    add("--repeats", type=whole(1), default=3, help="rounds of the second table (default: %(default)s)")


def run(args: argparse.Namespace) -> Report:
    short = min(args.contexts)
    least = short + args.max_tokens + 32
    if (found := min(args.capacities)) < least:
        raise UserError(f"--capacities is {found}, expected {least} to {MOST}")
    names = list(dict.fromkeys(args.methods))
    shapes = [shape for name in names if (shape := shape_named(name)) is not None]
    pair = load_pair(args, baseline=False)  # a second target would be counted as memory
    pair.check_shapes(shapes)
    if any(drafts(name) for name in names):
        verifier_of(pair.model).checked()
    lift_context(pair.model, max(args.contexts) + args.max_tokens + 1)
    never_end(pair.tokenizer)
    text = long_text(pair.tokenizer, max(args.contexts))
    lengths = sorted(set(args.contexts))
    readings: list[Reading] = []
    for turn, length in enumerate(tqdm(lengths, desc="reading", unit="text", leave=False)):
        for name in turn_order(names, turn):
            readings.append(_read(pair, name, text[:length], args.max_tokens))
    readings.sort(key=lambda one: (one.tokens, names.index(one.method)))
    roomy = _capacities(pair, names, text[:short], args)
    pair.facts["texts"] = f"held-out Python source, {args.max_tokens} tokens after each"
    tables = [Table.of("long contexts", READINGS, readings), _capacity_table(roomy, CAPACITY_NOTE.format(short))]
    data = {
        "readings": readings,
        "capacities": [
            {"method": name, "tokens": short, "capacity": capacity, "step_seconds": spread}
            for name, each in roomy.items()
            for capacity, spread in each.items()
        ],
    }

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 3)
        _draw_readings(axes[0], axes[1], readings)
        series = {n: [(room, 1e3 * s.median) for room, s in each.items()] for n, each in roomy.items()}
        charts.lines(axes[2], series)
        charts.plain_axes(
            axes[2], "room in the cache (tokens)", "time of a step (ms)", f"behind {short} tokens, roomier caches"
        )
        charts.doubling(axes[2], sorted(set(args.capacities)))

    title = "Long contexts and roomy caches"
    return Report("context", title, pair.facts, pair.command, tables, NOTES, data, draw, (13.0, 4.5))


def _read(pair: Pair, name: str, text: list[int], max_tokens: int) -> Reading:
    """Reads a text and goes on from it."""
    needed = weights(pair.model)[1] + weights(pair.drafter)[1] + cache_bytes(pair.model, len(text) + max_tokens)
    gc.collect()
    mx.clear_cache()
    seen: list[float] = []

    def after_reading(stream: Iterable) -> Iterable:
        for response in stream:
            if not seen:
                seen.append(time.perf_counter())
                mx.reset_peak_memory()
            yield response

    tic = time.perf_counter()
    steps = step_times(after_reading(pair.decoder(pair.drafter, max_tokens).method(name)(text)))
    done = time.perf_counter()
    return Reading(
        tokens=len(text),
        method=name,
        reading_seconds=seen[0] - tic,
        step_seconds=statistics.median(steps),
        tokens_per_second=(max_tokens - 1) / (done - seen[0]),
        peak_bytes=mx.get_peak_memory(),
        needed_bytes=needed,
    )


def _capacities(
    pair: Pair, names: list[str], text: list[int], args: argparse.Namespace
) -> dict[str, dict[int, Spread]]:
    """Seconds per step by method and room of the cache, in turn."""
    rooms = sorted(set(args.capacities))
    times: dict[str, dict[int, list[float]]] = {name: {room: [] for room in rooms} for name in names}
    decoder = pair.decoder(pair.drafter, args.max_tokens)
    for turn in tqdm(range(args.repeats), desc="roomy caches", unit="round", leave=False):
        for name in names:
            for room in turn_order(rooms, turn):
                decoder.caches = functools.partial(roomy_cache, pair.model, room)
                times[name][room].append(statistics.median(step_times(decoder.method(name)(text))))
    return {name: {room: Spread.of(seconds) for room, seconds in each.items()} for name, each in times.items()}


READINGS: dict[str, Callable[[Reading], str]] = {
    "context, method": lambda one: f"{one.tokens}, {one.method}",
    "reading, tokens/s": lambda one: f"{one.tokens / one.reading_seconds:.0f}",
    "step, ms": lambda one: f"{1e3 * one.step_seconds:.2f}",
    "tokens/s": lambda one: f"{one.tokens_per_second:.1f}",
    "peak, MB": lambda one: f"{one.peak_bytes / 1e6:.1f}",
    "needed, MB": lambda one: f"{one.needed_bytes / 1e6:.1f}",
    "peak/needed": lambda one: f"{one.peak_bytes / one.needed_bytes:.2f}",
}


def _capacity_table(roomy: dict[str, dict[int, Spread]], note: str) -> Table:
    rooms = list(next(iter(roomy.values()), {}))
    rows = []
    for name, each in roomy.items():
        times = [1e3 * each[room].median for room in rooms]
        rows.append([name, *(f"{ms:.2f}" for ms in times), f"{times[-1] / times[0]:.2f}x"])
    return Table("roomy caches", ["method", *(f"room for {room}" for room in rooms), "last/first"], rows, note)


def _draw_readings(times: Any, memory: Any, readings: list[Reading]) -> None:
    by_method: dict[str, list[Reading]] = {}
    for one in readings:
        by_method.setdefault(one.method, []).append(one)
    charts.lines(times, {n: [(r.tokens, 1e3 * r.step_seconds) for r in each] for n, each in by_method.items()})
    charts.plain_axes(times, "context (tokens)", "time of a step (ms)", "a step behind a context")
    charts.doubling(times, sorted({one.tokens for one in readings}))
    charts.lines(memory, {n: [(r.tokens, r.peak_bytes / 1e6) for r in each] for n, each in by_method.items()})
    most = max(by_method.values(), key=lambda each: each[-1].needed_bytes)
    memory.plot([r.tokens for r in most], [r.needed_bytes / 1e6 for r in most], ":", color="black", label="needed")
    memory.legend(fontsize=8, frameon=False)
    charts.plain_axes(memory, "context (tokens)", "memory (MB)", "peak while decoding")
    charts.doubling(memory, sorted({one.tokens for one in readings}))
