"""Measures what each choice in training a drafter is worth: short runs that differ in one thing.

All variants make the same number of updates, on the same text where the text is not the
choice. A run that was stopped goes on where it was: finished variants stay in --work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from mlx_redrafter.benchmarks.charts import COLOURS, plain_axes
from mlx_redrafter.benchmarks.compare import Method, equality_of, side_by_side, summarize
from mlx_redrafter.benchmarks.competitors import PLAIN
from mlx_redrafter.benchmarks.flags import add_out_argument, add_text_arguments, check_texts
from mlx_redrafter.benchmarks.pair import Loaded, encode_texts, load_scaled
from mlx_redrafter.benchmarks.report import Report, check_out

from mlx_redrafter.drafting.kinds import Drafter, open_drafter
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.embedded.corpus import stdlib_files
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import replace_file
from mlx_redrafter.system.flag_types import whole
from mlx_redrafter.system.table import Table
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.text.flags import add_target_arguments
from mlx_redrafter.text.loading import NO_DRAFTER, is_embedded
from mlx_redrafter.training import command as train_command
from mlx_redrafter.training.acceptance_length import acceptance_length
from mlx_redrafter.training.text.data_plan import SELF, DataPlan
from mlx_redrafter.training.text.sources import prepare

HELP = "train drafters that differ in one choice each, and compare them"
TREE, CHAIN = DraftShape(4, 5, 12), DraftShape(1, 4, 3)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A choice.

    Args:
        name: for the table.
        flags: of `mlx-redrafter train`, beside those of the base.
        text: which text it learns from.
        of, bits: the weights of another variant, quantised after training.
    """

    name: str
    flags: tuple[str, ...] = ()
    text: str = SELF
    of: str | None = None
    bits: int | None = None


BASE = "base"
FILES = "files"
VARIANTS = (
    Variant(BASE),
    Variant("text from files, target's distribution", text=FILES),
    Variant("text from files, its own next token", ("--loss", "text"), FILES),
    Variant("hard labels", ("--loss", "hard")),
    Variant("whole distribution", ("--teacher-top-k", "0")),
    Variant("equal step weights", ("--step-weights", "1", "1", "1", "1")),
    Variant("all positions at every step", ("--step-shares", "1", "1", "1", "1")),
    Variant("no residual block", ("--num-draft-layers", "0")),
    Variant("4 residual blocks", ("--num-draft-layers", "4")),
    Variant("no recurrence", ("--no-rnn",)),
    Variant("exit_dim half", ("--exit-dim", "HALF")),
    Variant("exit_dim double", ("--exit-dim", "DOUBLE")),
    Variant("vocabulary 2048", ("--draft-vocab-size", "2048")),
    Variant("vocabulary 1024", ("--draft-vocab-size", "1024")),
    Variant("output layer begun at random", ("--output-layer", "random")),
    Variant("output layer tied", ("--output-layer", "tied")),
    Variant("8 bit", of=BASE, bits=8),
    Variant("4 bit", of=BASE, bits=4),
    Variant("4 bit, trained for it", ("--q-bits", "4", "--q-aware")),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_target_arguments(add)
    add("--work", required=True, metavar="DIR", help="keeps the text and the finished drafters")
    add("--files", nargs="+", metavar="PATH", help="text for the variants that learn from files (default, for the"
        " embedded target: the standard library's files that were not held out)")  # fmt: skip
    add("--rows", type=whole(32), default=600, help="rows of text (default: %(default)s)")
    add("--iters", type=whole(1), default=250, help="updates of each variant (default: %(default)s)")
    add("--only", nargs="+", metavar="NAME", help=f"only these variants, beside {BASE!r}")
    add_text_arguments(parser)
    add_out_argument(parser)
    parser.set_defaults(draft=NO_DRAFTER, adapter_path=None, dtype=None, trust_remote_code=False)


def run(args: argparse.Namespace) -> Report:
    prompts = check_texts(args)
    check_out(args.out)
    known = [variant.name for variant in VARIANTS]
    for name in args.only or ():
        if name not in known:
            raise UserError(f"--only {name}: no such variant, expected some of {', '.join(known)}")
    chosen = [v for v in VARIANTS if args.only is None or v.name in (BASE, *args.only)]
    loaded = load_scaled(args, 1.0)
    target = verifier_of(loaded.model).target
    work = pathlib.Path(args.work)
    for text in dict.fromkeys(variant.text for variant in chosen):
        _write_text(args, work, text, target, loaded)
    for variant in chosen:
        if variant.of is None:
            _train(args, work, variant, target)
    texts = encode_texts(args, loaded, prompts)
    return _report(args, loaded, target, {v.name: _finished(work, v, target) for v in chosen}, texts)


def _write_text(args: argparse.Namespace, work: pathlib.Path, text: str, target: Target, loaded: Loaded) -> None:
    """The rows that variants share."""
    data: tuple[str, ...] = (SELF,)
    if text == FILES:
        data = tuple(args.files or ())
        if not data and not is_embedded(args.model):
            raise UserError("--files is missing: text for the variants that learn from files")
        if not data:
            library = work / "library.jsonl"
            files = [text for _, text, held_out, is_test in stdlib_files() if not held_out and not is_test and text]
            with replace_file(library) as file:
                file.write_text("".join(json.dumps({"text": each}) + "\n" for each in files))
            data = (str(library),)
    # Acceptance is measured here, on the same prompts for all; a training measures its own on what it holds out.
    plan = DataPlan(data, rows=args.rows, held_out=1, batch_size=256)
    prepare(work / f"text-{text}", target, loaded.tokenizer, plan, embedded=is_embedded(args.model))


def _train(args: argparse.Namespace, work: pathlib.Path, variant: Variant, target: Target) -> None:
    """Trains a variant, unless it is there already."""
    out = _folder(work, variant.name)
    if (out / "training" / "result.json").exists():
        return
    sizes = {"HALF": str(target.hidden_size // 2), "DOUBLE": str(target.hidden_size * 2)}
    flags = [sizes.get(flag, flag) for flag in variant.flags]
    model = ["--model", args.model, *(() if args.gguf is None else ("--gguf", args.gguf))]
    rows = ["--text", str(work / f"text-{variant.text}")]
    fixed = ["--iters", str(args.iters), "--eval-every", "0", "--dtype", "float32"]
    parser = argparse.ArgumentParser()
    train_command.add_arguments(parser)
    resume = ["--resume"] if (out / "training" / "arguments.json").exists() else []
    print(f"\n{variant.name}")
    train_command.run(parser.parse_args([*model, "--out", str(out), *rows, *fixed, *flags, *resume]))


def _finished(work: pathlib.Path, variant: Variant, target: Target) -> Drafter:
    drafter = open_drafter(_folder(work, variant.of or variant.name))
    check_pair(target, drafter, variant.name)
    if variant.bits is not None:
        drafter.quantize(bits=variant.bits)
    return drafter


def _folder(work: pathlib.Path, name: str) -> pathlib.Path:
    return work / "".join(c if c.isalnum() else "-" for c in name)


def _report(
    args: argparse.Namespace,
    loaded: Loaded,
    target: Target,
    drafters: dict[str, Drafter],
    texts: list[list[int]],
) -> Report:
    methods: dict[str, Method] = {PLAIN: loaded.decoder(None, args.max_tokens).plain}
    methods |= {name: loaded.decoder(drafter, args.max_tokens).drafted(CHAIN) for name, drafter in drafters.items()}
    found = summarize(side_by_side(methods, texts, reference_every=8))
    rows: list[dict[str, Any]] = [
        {
            "variant": name,
            "acceptance_tree": acceptance_length(target, drafter, texts, TREE, args.max_tokens),
            "acceptance_chain": found[name].acceptance,
            "bytes_per_draft_step": drafter.bytes_per_draft_step(),
            "tokens_per_second": found[name].tokens_per_second,
            "speed_up": found[name].speed_up.median,
            "equal": found[name].equal,
            "runs": found[name].runs,
        }
        for name, drafter in drafters.items()
    ]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "variant": lambda row: row["variant"],
        "acceptance, tree of 12": lambda row: f"{row['acceptance_tree']:.2f}",
        "chain of 3": lambda row: f"{row['acceptance_chain']:.2f}",
        "MB per draft step": lambda row: f"{row['bytes_per_draft_step'] / 1e6:.2f}",
        "tokens/s, chain": lambda row: f"{row['tokens_per_second']:.1f}",
        "speed-up": lambda row: f"{row['speed_up']:.2f}x",
    }
    table = Table.of(f"{args.iters} updates each", columns, rows)
    notes = [
        f"{BASE}: rnn, exit_dim = hidden_size, 2 residual blocks, all tokens, output layer begun from the target's,"
        " text written by the target, its 16 most probable tokens; the others differ in what their name says.",
        "acceptance: mean acceptance length, greedy; tree: W = 4, L = 5, best-first.",
        f"texts equal to mlx_lm's, token for token: {equality_of(found)}",
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for i, row in enumerate(rows):
            x, y = row["bytes_per_draft_step"] / 1e6, row["acceptance_tree"]
            axes.plot(x, y, "o", color=COLOURS[0 if i else 3])
            axes.annotate(row["variant"], (x, y), textcoords="offset points", xytext=(5, 3), fontsize=7)
        plain_axes(axes, "read per draft step (MB)", "mean acceptance length (tokens/step), tree of 12")

    data = {"plain_tokens_per_second": found[PLAIN].tokens_per_second, "variants": rows}
    title = "What each choice in training is worth"
    return Report("ablation", title, loaded.facts, loaded.command, [table], notes, data, draw, (9.0, 6.0))
