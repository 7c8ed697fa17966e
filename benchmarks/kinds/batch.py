"""Measures tokens per second of many texts at once, side by side in one run.

Every round writes the same texts with mlx_lm's batch, and with ours without and with drafts,
on the same weights and layout, in an order that rotates. As one text ends, the next begins in
its place, as in a server that is kept busy. How much ours drafts goes by how many texts run.
Each is then compared with the text that mlx_lm's loop writes alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import mlx_lm
from mlx_redrafter.benchmarks import charts
from mlx_redrafter.benchmarks.compare import Spread, turn_order
from mlx_redrafter.benchmarks.flags import add_common_arguments, add_text_arguments, check_texts
from mlx_redrafter.benchmarks.pair import Pair, encode_texts, load_pair
from mlx_redrafter.benchmarks.report import Report
from tqdm import tqdm

from mlx_redrafter.system.flag_types import whole
from mlx_redrafter.system.table import Table
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.text.batches.generate import batch_generate
from mlx_redrafter.text.equality import compare_texts

HELP = "many texts at once, beside mlx_lm's batch"

NOTES = [
    "tokens/s: of all texts together, reading the prompts included, median over the rounds",
    "x: mlx_lm's time per token over the method's, round by round; median and quartiles (25 %, 75 %)",
    "acceptance: tokens per step and text, all rounds together",
    "equal: texts that are those of mlx_lm's loop alone, token for token",
]
MLX_LM, OURS, DRAFTED = "mlx_lm", "ours", "ours with drafts"
METHODS = [MLX_LM, OURS, DRAFTED]


@dataclasses.dataclass
class Round:
    """Some texts, written together once.

    Attributes:
        seconds: from the first prompt to the last token.
        tokens: of all texts.
        acceptance: tokens per step and text.
        equal, texts: how many of the texts are those written alone.
    """

    seconds: float
    tokens: int
    acceptance: float
    equal: int
    texts: int

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    add_text_arguments(parser, prompts=16)
    add = parser.add_argument
    add("--batch-sizes", type=whole(1), nargs="+", default=[1, 2, 4, 8, 16], metavar="B",
        help="texts at once (default: 1 2 4 8 16)")  # fmt: skip
    add("--waves", type=whole(1), default=2, metavar="W", help="write W times as many texts in a round: as one"
        " ends, the next begins in its place (default: %(default)s)")  # fmt: skip
    add("--repeats", type=whole(1), default=3, help="rounds per number of texts, each with other prompts where there"
        " are enough (default: %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> Report:
    prompts, sizes = check_texts(args), sorted(set(args.batch_sizes))
    pair = load_pair(args, baseline=False)
    verifier_of(pair.model).checked()
    texts = encode_texts(args, pair, prompts)
    alone = [_alone(pair, text, args.max_tokens) for text in texts]
    methods = {size: _methods(pair, args.max_tokens, size) for size in sizes}
    runs: dict[int, dict[str, list[Round]]] = {size: {name: [] for name in METHODS} for size in sizes}
    with tqdm(total=len(sizes) * (1 + args.repeats) * len(METHODS), desc="measuring", unit="round", leave=False) as bar:
        for size in sizes:
            for turn in range(1 + args.repeats):
                chosen = [i % len(texts) for i in range(turn * size * args.waves, (turn + 1) * size * args.waves)]
                for name in turn_order(METHODS, turn):
                    one = _round(methods[size][name], [texts[i] for i in chosen], [alone[i] for i in chosen])
                    if turn:  # the first round warms up, and learns what steps of so many texts cost
                        runs[size][name].append(one)
                    bar.update()
    ratios = {size: _ratios(found) for size, found in runs.items()}
    tables = [_table(size, found, ratios[size]) for size, found in runs.items()]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        lines = {name: [(size, _rate(runs[size][name]).median) for size in sizes] for name in METHODS}
        charts.lines(axes, lines)
        charts.doubling(axes, sizes)
        charts.plain_axes(axes, "texts at once", "tokens/s of all texts")

    data = {"sizes": [{"texts": size, "runs": runs[size], "ratios": ratios[size]} for size in sizes]}
    return Report("batch", "Many texts at once", pair.facts, pair.command, tables, NOTES, data, draw)


def _methods(pair: Pair, max_tokens: int, size: int) -> dict[str, Callable[[list[list[int]]], Any]]:
    """What writes texts for prompts, so many at once, by name."""
    asked: dict[str, Any] = {"max_tokens": max_tokens, "return_token_ids": True, "completion_batch_size": size}
    model, tokenizer = pair.model, pair.tokenizer
    return {
        # Of more prompts that it may read at once mlx_lm would make more texts at once.
        MLX_LM: lambda prompts: mlx_lm.batch_generate(
            model, tokenizer, prompts, prefill_batch_size=min(8, size), **asked
        ),
        OURS: lambda prompts: batch_generate(model, tokenizer, prompts, **asked),
        DRAFTED: lambda prompts: batch_generate(model, tokenizer, prompts, drafter=pair.drafter, **asked),
    }


def _alone(pair: Pair, prompt: list[int], max_tokens: int) -> list[int]:
    """The text without the token that ends it, as batches return it."""
    responses = list(pair.decoder(None, max_tokens).plain(prompt))
    return [one.token for one in responses if one.finish_reason != "stop"]


def _round(method: Callable[[list[list[int]]], Any], prompts: list[list[int]], alone: list[list[int]]) -> Round:
    start = time.perf_counter()
    found = method(prompts)
    seconds = time.perf_counter() - start
    equality = compare_texts(zip(alone, found.token_ids, strict=True))
    acceptance = getattr(found.stats, "mean_acceptance_length", 1.0)
    return Round(seconds, found.stats.generation_tokens, acceptance, equality.equal, equality.texts)


def _rate(rounds: list[Round]) -> Spread:
    return Spread.of([one.rate for one in rounds])


def _ratios(runs: dict[str, list[Round]]) -> dict[str, Spread]:
    """Of each method, how much faster it was than mlx_lm's batch on the same texts."""
    return {
        name: Spread.of([one.rate / base.rate for one, base in zip(rounds, runs[MLX_LM], strict=True)])
        for name, rounds in runs.items()
    }


def _table(size: int, runs: dict[str, list[Round]], ratios: dict[str, Spread]) -> Table:
    rows = []
    for name, rounds in runs.items():
        acceptance = sum(one.acceptance for one in rounds) / len(rounds)
        equal = f"{sum(one.equal for one in rounds)}/{sum(one.texts for one in rounds)}"
        spread = [f"{value:.2f}" for value in vars(ratios[name]).values()]
        rows.append([name, f"{_rate(rounds).median:.1f}", *spread, f"{acceptance:.2f}", equal])
    title = f"{size} at once"
    return Table(title, ["", "tokens/s", "x", "25 %", "75 %", "acceptance", "equal"], rows)
