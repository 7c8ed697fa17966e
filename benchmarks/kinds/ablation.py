"""Measures what each choice in training is worth: recipes on the same text, each for the same minutes.

The target reads the text once for all of them. Acceptance is measured on its own greedy texts of given prompts. A run
that was stopped goes on where it was: what is finished stays in --work.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from mlx_redrafter.benchmarks.ablation.acceptance import acceptance_on
from mlx_redrafter.benchmarks.ablation.lab import Lab, flags_of
from mlx_redrafter.benchmarks.ablation.recipes import RECIPES, Recipe, chosen
from mlx_redrafter.benchmarks.ablation.texts import Text, own_texts
from mlx_redrafter.benchmarks.charts import COLOURS, plain_axes
from mlx_redrafter.benchmarks.flags import add_out_argument, add_text_arguments, check_texts
from mlx_redrafter.benchmarks.pair import encode_prompts
from mlx_redrafter.benchmarks.report import Report, check_out, command_line

from mlx_redrafter.drafting.kinds import Drafter, open_drafter
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape
from mlx_redrafter.system.device import device_facts, on_cpu
from mlx_redrafter.system.files import read_json, write_json
from mlx_redrafter.system.flag_types import real, whole
from mlx_redrafter.system.openblas_layout import pack
from mlx_redrafter.system.table import Table
from mlx_redrafter.system.weights import describe
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.text.flags import add_target_arguments
from mlx_redrafter.text.loading import find_target, fit_drafter, load_target
from mlx_redrafter.training.drafters.kinds import METHODS
from mlx_redrafter.training.resume import earlier_rows
from mlx_redrafter.tuning.measure import measure
from mlx_redrafter.tuning.step_costs import Costs

HELP = "train drafters by recipes that differ in one choice each, for the same minutes, and compare them"
SHAPES = (DraftShape(1, 4, 3), DraftShape(4, 5, 7), DraftShape(4, 5, 12))
CONTEXT = 256  # tokens before a step, in the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_target_arguments(add)
    add("--work", required=True, metavar="DIR", help="keep readings, texts and finished drafters here")
    add("--text", nargs="+", required=True, metavar="DIR", help="rows that trainings for this target wrote"
        " (training/text)")  # fmt: skip
    add("--rows", type=whole(1), help="learn from so many of them, spread evenly (default: all)")
    add("--minutes", type=real(0, 10_000), default=10.0, help="train each recipe for so long, readings not counted"
        " (default: %(default)s)")  # fmt: skip
    add("--recipes", nargs="+", metavar="NAME", help=f"of {', '.join(recipe.name for recipe in RECIPES)}, or NAME=FLAGS"
        " of `mlx-redrafter train` (default: all of these)")  # fmt: skip
    add("--train-flags", default="", metavar="FLAGS", help="flags of `mlx-redrafter train` for all recipes, before"
        " their own; those that a kind of drafter does not have are left out for it")  # fmt: skip
    add("--readings-of", metavar="DRAFTER", help="WORK/readings are those of this drafter's training: their labels are"
        " among its tokens (default: all tokens, or those of --draft-vocab-size in --train-flags)")  # fmt: skip
    add("--cache-gb", type=real(0, 2**20), default=8.0, help="disk for what the target made of the text (default:"
        " %(default)s)")  # fmt: skip
    add_text_arguments(parser, prompts=80)
    add_out_argument(parser)


def run(args: argparse.Namespace) -> Report:
    recipes, prompts = chosen(args.recipes), check_texts(args, any_target=True)
    check_out(args.out)
    folder = find_target(args.model, "--model", args.gguf)
    model, tokenizer = load_target(folder, None, "float32" if on_cpu() else None)
    verifier = verifier_of(model).checked(f"--model {args.model}:")
    target, work = verifier.target, pathlib.Path(args.work)
    flags = {recipe.name: flags_of(args, recipe, target, work) for recipe in recipes}
    encoded = encode_prompts(args, model, tokenizer, prompts)
    rows = earlier_rows(args.text, target, tokenizer, max(METHODS[f.method].steps(f) for f in flags.values()))
    model.freeze()
    common = flags_of(args, Recipe("all", ()), target, work)
    lab = Lab(args, target, tokenizer, rows, common, list(flags.values()), work)
    for recipe in recipes:
        lab.train(recipe, flags[recipe.name])
    lab.teacher.close()
    ends, kept = set(tokenizer.eos_token_ids), work / "texts.safetensors"
    texts = own_texts(target, encoded, args.max_tokens, ends, lab.layers, kept)
    found = [_measured(recipe, work / recipe.name, target, texts, lab.layers) for recipe in recipes]
    facts = device_facts() | {"target": f"{args.model}, {describe(model)}"}
    shortest, longest = min(map(len, encoded)), max(map(len, encoded))
    facts["texts"] = f"{len(encoded)} prompts of {shortest} to {longest} tokens, up to {args.max_tokens} more each"
    facts["learned from"] = f"{len(lab.picks):,} rows of {rows.length} tokens, {args.minutes:g} minutes each"
    pack(model)
    measured = []
    for row in found:
        drafter = open_drafter(work / row["recipe"])
        fit_drafter(drafter, model, tokenizer, row["recipe"])
        print(f"{row['recipe']}: measuring what its steps cost")
        measured.append(measure(verifier, drafter))
    for row, costs in zip(found, measured, strict=True):
        row |= _speed(row, _with_targets_best(costs, measured))
    return _report(args, facts, found)


def _measured(
    recipe: Recipe, out: pathlib.Path, target: Target, texts: list[Text], layers: tuple[int, ...]
) -> dict[str, Any]:
    """What came of a recipe, acceptance included, which result.json keeps."""
    facts = read_json(out / "result.json")
    drafter: Drafter = open_drafter(out)
    check_pair(target, drafter, recipe.name)
    of = [sum(len(text.tokens) for text in texts), len(texts), *map(str, SHAPES)]
    if facts.get("acceptance_of") != of:
        facts["acceptance"] = []
        for shape in SHAPES:
            facts["acceptance"].append(acceptance_on(target, drafter, texts, layers, shape))
            print(f"{recipe.name}: {shape}: {facts['acceptance'][-1]:.3f} tokens per step")
        facts |= {"acceptance_of": of, "bytes_per_draft_step": drafter.bytes_per_draft_step()}
        facts["bytes"] = (out / "model.safetensors").stat().st_size
        write_json(out / "result.json", facts)
    return {"recipe": recipe.name, "words": recipe.words or " ".join(recipe.flags), **facts}


def _with_targets_best(costs: Costs, others: list[Costs]) -> Costs:
    """The costs with the target's least ones of all measurements: it is the same target."""

    def best(tables: list[dict[int, float]]) -> dict[int, float]:
        return {key: min(table[key] for table in tables) for key in tables[0]}

    verify = {context: best([one.verify[context] for one in others]) for context in costs.verify}
    return dataclasses.replace(costs, verify=verify, plain=best([one.plain for one in others]))


def _speed(row: dict[str, Any], costs: Costs) -> dict[str, Any]:
    """Of a recipe's drafter: time of a draft step, and tokens per second with its best shape."""
    speeds = [length / costs.step_seconds(Drafted(shape), CONTEXT) for length, shape in zip(row["acceptance"], SHAPES)]
    best = int(np.argmax(speeds))
    return {
        "draft_step_ms": 1000 * costs.draft_seconds(1, 4) / 3,
        "tokens_per_second": speeds[best],
        "best": str(SHAPES[best]),
        "speed_up": speeds[best] * costs.step_seconds(PLAIN, CONTEXT),
    }


def _report(args: argparse.Namespace, facts: dict[str, str], rows: list[dict[str, Any]]) -> Report:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "recipe": lambda row: row["recipe"],
        "what it is": lambda row: row["words"],
        **{f"{shape}": lambda row, i=i: f"{row['acceptance'][i]:.2f}" for i, shape in enumerate(SHAPES)},  # type: ignore
        "ms per draft step": lambda row: f"{row['draft_step_ms']:.2f}",
        "MB per draft step": lambda row: f"{row['bytes_per_draft_step'] / 1e6:.1f}",
        "MB": lambda row: f"{row['bytes'] / 1e6:.1f}",
        "positions/s": lambda row: f"{row['positions_per_second']:.0f}",
        "updates": lambda row: f"{row['updates']:,}",
        "tokens/s": lambda row: f"{row['tokens_per_second']:.1f} ({row['best']})",
        "speed-up": lambda row: f"{row['speed_up']:.2f}x",
    }
    table = Table.of("", columns, rows)
    notes = [
        "Chains and trees: mean acceptance length, greedy. The target's own texts are known, so that drafts are"
        " compared with them; a step accepts what it would accept in decoding.",
        "ms per draft step: a third of what a chain of 3 takes beyond its rows. MB: as float32.",
        "positions/s: tokens of text that training goes through, what the target made of them being known.",
        f"tokens/s, speed-up: acceptance by the time of a step behind {CONTEXT} tokens, for the best of the three"
        " shapes; the target decoding plainly is 1.",
    ]
    if args.train_flags:
        notes.append(f"All recipes: `{args.train_flags}`.")

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for i, row in enumerate(rows):
            x, y = row["draft_step_ms"], row["acceptance"][-1]
            axes.plot(x, y, "o", color=COLOURS[0 if i else 3])
            axes.annotate(row["recipe"], (x, y), textcoords="offset points", xytext=(5, 3), fontsize=7)
        plain_axes(axes, "time of a draft step (ms)", f"mean acceptance length (tokens/step), {SHAPES[-1]}")

    command, title = command_line(args, args.parser), "What each choice in training is worth"
    return Report("ablation", title, facts, command, [table], notes, {"recipes": rows}, draw, (9.0, 6.0))
