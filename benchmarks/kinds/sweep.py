"""Measures speed-up and mean acceptance length over the shapes of drafts.

There are two sweeps, greedy. All settings take turns on the same prompts, with mlx_lm's plain loop
again after every eight of them, and beside them what auto reaches. Over beam width W and
beam length L: each cell is the best of the numbers N of draft tokens that were tried there.
Over N: a chain, the paper's tree (beams) and the most probable nodes (best-first), at equal
rows to verify.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from mlx_redrafter.benchmarks import charts
from mlx_redrafter.benchmarks.compare import Summary, equality_of, side_by_side, summarize
from mlx_redrafter.benchmarks.competitors import DRAFTER_AUTO, PLAIN, name_of
from mlx_redrafter.benchmarks.flags import add_common_arguments, add_text_arguments, check_texts
from mlx_redrafter.benchmarks.pair import encode_texts, load_pair
from mlx_redrafter.benchmarks.report import Report

from mlx_redrafter.drafting.shape import AUTO, BEAMS, BEST_FIRST, DraftShape
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.table import Table
from mlx_redrafter.target.probe import verifier_of

HELP = "speed-up and acceptance over beam width, beam length and number of draft tokens"

WIDTHS, LENGTHS, NODES = (1, 2, 3, 4, 6, 8), (2, 3, 4, 5, 6), (2, 3, 4, 6, 8, 12, 16)
QUICK_WIDTHS, QUICK_LENGTHS, QUICK_NODES = (1, 2, 4), (3, 5), (4, 8)
POLICY_NODES = (4, 8, 12, 16)
POLICY_WIDTH, POLICY_LENGTH = 4, 5
AUTOS = (DRAFTER_AUTO, AUTO)

# What a cell shows of a setting's summary and shape.
SPEED, SPEED_AND_NODES = "{0.speed_up.median:.2f}", "{0.speed_up.median:.2f} ({1.num_draft_tokens})"
ACCEPTANCE = "{0.acceptance:.2f}"

NOTES = [
    "speed-up: the time per token of mlx_lm's plain loop on the same weights and layout over the setting's, median",
    "acceptance: mean acceptance length, tokens per step, all texts together",
]

Shapes = list[list[DraftShape | None]]  # by row and column of a grid; None where nothing was tried
Results = dict[DraftShape, Summary]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    add_text_arguments(parser, prompts=8, max_tokens=64)
    add = parser.add_argument
    add("--widths", type=int, nargs="+", metavar="W", help=f"beam widths (default: {_words(WIDTHS)})")
    add("--lengths", type=int, nargs="+", metavar="L", help=f"beam lengths (default: {_words(LENGTHS)})")
    add("--nodes", type=int, nargs="+", metavar="N", help=f"draft tokens checked (default: {_words(NODES)})")
    add("--quick", action="store_true", help="fewer settings: W"
        f" {_words(QUICK_WIDTHS)}, L {_words(QUICK_LENGTHS)}, N {_words(QUICK_NODES)}")  # fmt: skip


def run(args: argparse.Namespace) -> Report:
    prompts = check_texts(args)
    usual = (QUICK_WIDTHS, QUICK_LENGTHS, QUICK_NODES) if args.quick else (WIDTHS, LENGTHS, NODES)
    widths, lengths, nodes = (
        sorted(set(asked or default)) for asked, default in zip((args.widths, args.lengths, args.nodes), usual)
    )
    cells = {(w, length): _in_cell(w, length, nodes) for w in widths for length in lengths}
    policies = _policies(nodes if args.nodes or args.quick else POLICY_NODES)
    shapes = list(dict.fromkeys([*(s for cell in cells.values() for s in cell), *policies.values()]))
    _check(shapes, 2**31)
    pair = load_pair(args)
    _check(shapes, pair.drafter.config.vocab_size)
    texts = encode_texts(args, pair, prompts)
    verifier_of(pair.model).checked()
    decoder = pair.decoder(pair.drafter, args.max_tokens)
    methods = {name: decoder.method(name) for name in (PLAIN, *map(name_of, shapes), *AUTOS)}
    found = summarize(side_by_side(methods, texts, reference_every=8))
    results = {shape: found[name_of(shape)] for shape in shapes}
    winner = max(shapes, key=lambda shape: _speed(results[shape]))
    notes = [
        *NOTES,
        f"best: {name_of(winner)} at {_speed(results[winner]):.2f}x (acceptance {results[winner].acceptance:.2f})",
        *(_beside(name, found[name], results[winner]) for name in AUTOS),
        f"texts equal to mlx_lm's, token for token: {equality_of(found)}",
    ]
    best = [[max(cells[w, n], key=lambda s: _speed(results[s]), default=None) for n in lengths] for w in widths]
    names = list(dict.fromkeys(policy for policy, _ in policies))
    budgets = sorted({n for _, n in policies})
    at_equal_rows = [[policies.get((name, n)) for n in budgets] for name in names]
    shown = [name if name == "chain" else f"{name}, W = {POLICY_WIDTH}" for name in names]
    trees = f"at equal rows, trees of W = {POLICY_WIDTH}"
    by_beams = [f"W = {w}" for w in widths], [f"L = {length}" for length in lengths], best, results
    by_policy = names, [f"N = {n}" for n in budgets], at_equal_rows, results
    tables = [
        _table("speed-up, best N in brackets", SPEED_AND_NODES, *by_beams),
        _table("mean acceptance length at that N", ACCEPTANCE, *by_beams),
        _table(f"mean acceptance length {trees}", ACCEPTANCE, *by_policy),
        _table(f"speed-up {trees}", SPEED, *by_policy),
    ]
    data = {
        "plain_tokens_per_second": found[PLAIN].tokens_per_second,
        "best": name_of(winner),
        "settings": [
            {"name": name_of(shape)} | dataclasses.asdict(shape) | vars(one) for shape, one in results.items()
        ],
        "auto": {name: found[name] for name in AUTOS},
    }

    def draw(figure: Any) -> None:
        axes = figure.subplots(2, 2)
        length = "mean acceptance length (tokens/step)"
        for row, column, title, label, value in (
            (0, 0, "speed-up over plain, best N in brackets", SPEED_AND_NODES, _speed),
            (0, 1, f"{length} at that N", ACCEPTANCE, _acceptance),
            (1, 0, "speed-up over plain at equal rows", SPEED, _speed),
            (1, 1, f"{length} at equal rows", ACCEPTANCE, _acceptance),
        ):
            shapes, rows, columns = (best, widths, lengths) if row == 0 else (at_equal_rows, shown, budgets)
            values = [[value(results[s]) if s else None for s in line] for line in shapes]
            one, words = axes[row][column], _cells(shapes, results, label)
            charts.heat_map(figure, one, values, list(map(str, rows)), list(map(str, columns)), words)
            one.set_title(title, fontsize=10)
            one.set_xlabel("draft tokens N verified per step" if row else "beam length L (tokens, the root included)")
            one.set_ylabel("" if row else "beam width W (beams)")

    return Report("sweep", "Shapes of drafts", pair.facts, pair.command, tables, notes, data, draw, (12.0, 8.0))


def _beside(name: str, auto: Summary, best: Summary) -> str:
    """What choosing as it goes reached, in words."""
    return (
        f"{name}: {auto.speed_up.median:.2f}x (acceptance {auto.acceptance:.2f}),"
        f" {auto.tokens_per_second / best.tokens_per_second:.0%} of the best setting's tokens per second"
    )


def _in_cell(width: int, length: int, nodes: Sequence[int]) -> list[DraftShape]:
    """What is tried at one W and L: every N that fits, or all of a beam search too small for any."""
    most = width * (length - 1)
    if width == 1:  # a chain of fewer nodes is a shorter chain
        return [DraftShape(1, length, most)]
    # Fewer nodes than a beam is long would leave its end unread.
    fitting = [n for n in nodes if length - 1 <= n <= most] or [min(most, max(nodes))]
    return [DraftShape(width, length, n, BEST_FIRST) for n in fitting]


def _policies(nodes: Sequence[int]) -> dict[tuple[str, int], DraftShape]:
    """A chain and both trees for each N; a tree's beams are made longer where W (L - 1) is too small."""
    shapes = {("chain", n): DraftShape(1, n + 1, n) for n in nodes if n < 32}
    for policy in (BEAMS, BEST_FIRST):
        for n in nodes:
            length = max(POLICY_LENGTH, -(-n // POLICY_WIDTH) + 1)
            shapes[policy, n] = DraftShape(POLICY_WIDTH, length, n, policy)
    return shapes


def _check(shapes: Sequence[DraftShape], vocab_size: int) -> None:
    """As `DraftShape.check`, naming the flags of this command."""
    flags = {"--beam-width": "--widths", "--beam-length": "--lengths", "--num-draft-tokens": "--nodes"}
    try:
        for shape in shapes:
            shape.check(vocab_size)
    except UserError as error:
        raise UserError(re.sub("|".join(flags), lambda found: flags[found[0]], str(error))) from error


def _speed(one: Summary) -> float:
    return one.speed_up.median


def _acceptance(one: Summary) -> float:
    return one.acceptance


def _cells(shapes: Shapes, results: Results, label: str) -> list[list[str]]:
    return [[label.format(results[shape], shape) if shape else "" for shape in line] for line in shapes]


def _table(
    title: str, label: str, rows: Sequence[str], columns: Sequence[str], shapes: Shapes, results: Results
) -> Table:
    cells = _cells(shapes, results, label)
    return Table(title, ["", *columns], [[name, *line] for name, line in zip(rows, cells, strict=True)])


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
