"""Reports on a finished drafter: figures measured as it will be used, its model card, its curves.

Knows nothing of how it was trained but the log.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
import time
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_redrafter.drafting.drafter_files import DrafterBase
from mlx_redrafter.system.files import replace_file, write_json
from mlx_redrafter.system.flag_types import typed
from mlx_redrafter.system.hub import model_card
from mlx_redrafter.target.model import Target
from mlx_redrafter.training.acceptance_length import held_out_prompts
from mlx_redrafter.training.drafters.kinds import METHODS
from mlx_redrafter.training.drafters.recipes import USUAL, fixed
from mlx_redrafter.training.drafters.vocabulary import coverage, vocab_map_of
from mlx_redrafter.training.loss import HARD, KL, LK, TEXT, Objective
from mlx_redrafter.training.resume import arguments_of, defaults
from mlx_redrafter.training.text.data_plan import REGENERATED, SELF, SESSIONS
from mlx_redrafter.training.text.shards import Rows
from mlx_redrafter.training.trainer import TrainingPlan, TrainingResult
from mlx_redrafter.tuning.acceptance_model import RunningShare

EVALUATED_TOKENS = 64  # per prompt, at least
SECONDS = 1.0  # to measure the target's reading speed for
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
NOT_SHOWN = ("out", "upload_repo")  # in the command on the card


def report(
    args: argparse.Namespace,
    plan: TrainingPlan,
    result: TrainingResult,
    target: Target,
    rows: Rows,
    out: pathlib.Path,
) -> None:
    """Measures the finished drafter on held-out text and writes result.json, README.md and curves.png."""
    method, stored = METHODS[args.method], (out / "model.safetensors").stat().st_size
    finished, read = method.open(out, target)
    drafted, prompts = method.shape(args)[1], held_out_prompts(rows, args.prefix_length)
    tokens = max(EVALUATED_TOKENS, rows.length - len(prompts[0]))
    length = method.acceptance(args, finished, target, prompts, tokens)
    if isinstance(finished, DrafterBase):  # now knows how often its drafts are right
        write_json(out / "config.json", finished.config.to_dict(), indent=2)
    prefill = prefill_speed(target, rows, args.batch_size)
    speed = result.positions_per_second
    facts: dict[str, Any] = {
        "mean_acceptance_length": round(length, 3),
        "measured": f"greedy, {drafted}; {len(prompts)} held-out prompts, {tokens} tokens each",
        "objective": _in_words(plan.objective),
        "updates": result.updates,
        "batch_size": plan.batch_size,
        "best_while_training": result.best,
        "tokens_per_second": round(speed, 1),
        "target_tokens_per_second": round(prefill, 1),
        "prefill_ratio": round(speed / prefill, 3),
        "coverage": coverage(rows, vocab_map_of(finished)),
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
        "bytes": stored,
        "dtype": args.dtype,
        "bytes_per_draft_step": read,
    }
    log, picture = out / "training" / "log.jsonl", out / "training" / "curves.png"
    write_json(out / "training" / "result.json", facts | arguments_of(args), indent=1)
    with replace_file(out / "README.md") as file:
        file.write_text(_card(args, finished, _text(rows), facts))
    drawn = draw_curves(log, picture, f"{method.title} for {args.model}")
    print(
        f"{out}: mean acceptance length {length:.2f} on {len(prompts)} held-out prompts (greedy, {drafted})\n"
        f"{speed:.0f} tokens/s of text learned, {facts['prefill_ratio']:.2f} of the target's own"
        f" reading speed of {prefill:.0f} tokens/s"
    )
    print(f"{picture}" if drawn else "No curves were drawn: that takes matplotlib (pip install 'mlx-redrafter[bench]')")


def prefill_speed(target: Target, rows: Rows, batch_size: int) -> float:
    """Tokens per second that the target reads, no logits computed, as when it reads a prompt."""
    tokens = mx.array(rows[:batch_size][0])
    start, read = 0.0, -1
    while read < 1 or time.perf_counter() - start < SECONDS:
        if read == 0:  # the first pass was the warm-up
            start = time.perf_counter()
        cache = make_prompt_cache(target.model)
        target.forward(tokens, cache)
        mx.eval([layer.state for layer in cache])
        read += 1
    return read * tokens.size / (time.perf_counter() - start)


def _in_words(objective: Objective) -> str:
    top_k, hot = objective.top_k, objective.temperature
    distribution = f"the target's {f'{top_k} most probable tokens' if top_k else 'whole distribution'}"
    distribution += f" at temperature {hot}" if hot != 1 else ""
    labels = {
        KL: distribution,
        LK: distribution,
        HARD: "the target's most probable token",
        TEXT: "the next token of the text",
    }[objective.labels]
    against = "against" if objective.soft else "with"
    loss = "likelihood of acceptance and cross-entropy" if objective.labels == LK else "cross-entropy"
    weights, shares = (", ".join(f"{x:.2g}" for x in xs) for xs in (objective.step_weights, objective.step_shares))
    steps = len(objective.step_weights)
    return f"{loss} {against} {labels}; {steps} draft steps, weights {weights}, at shares {shares} of the positions"


def _text(rows: Rows) -> str:
    data = [name for manifest in rows.manifests for name in manifest["settings"]["data"]]
    own = {
        SELF: "written by the target itself",
        REGENERATED: "answers of the target",
        SESSIONS: "sessions with the target",
    }
    return (
        f"{', '.join(own.get(name, name) for name in data)}; {len(rows) - rows.held_out:,} rows of {rows.length} tokens"
    )


def command_line(arguments: dict[str, Any], defaults: dict[str, Any]) -> str:
    """The command that trains the same drafter; flags at their defaults are left out."""
    usual = defaults | {"recipe": USUAL}
    given = ((name, value) for name, value in arguments.items() if name not in NOT_SHOWN and value != usual.get(name))
    return shlex.join(["mlx-redrafter", "train", *typed(given), "--out", "OUT"])


def _card(args: argparse.Namespace, drafter: Any, text: str, facts: dict[str, Any]) -> str:
    """README.md for the Hub and for people; `text` says what the drafter learned from."""
    method, name = METHODS[args.method], args.model
    bits = f"{args.q_bits} bits" if args.q_bits else facts["dtype"]
    rows = {
        "target": name,
        "architecture": method.architecture(drafter, facts["coverage"]),
        "size": f"{facts['bytes'] / 1e6:.1f} MB, {bits}; {facts['bytes_per_draft_step'] / 1e6:.1f} MB read per"
        " draft step",
        "text": text,
        "objective": facts["objective"],
        "training": f"{facts['updates']:,} updates of {facts['batch_size']} texts,"
        f" {facts['tokens_per_second']:.0f} tokens per second, {facts['prefill_ratio']:.2f} of the target's own"
        " reading speed",
        "mean acceptance length": f"{facts['mean_acceptance_length']:.2f} ({facts['measured']})",
        "command": f"`{command_line(arguments_of(args), defaults() | fixed(args.recipe, args.method))}`",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    words = (
        f"# {method.title} for {name}\n\n"
        "It drafts for this target alone, which then writes the same text in fewer passes; made by\n"
        "[mlx-redrafter](https://arxiv.org/abs/2403.09919).\n\n"
        f"| | |\n|---|---|\n{table}\n\n    {method.use.format(model=shlex.quote(name))}\n"
    )
    return str(model_card(words, ["mlx", method.name, "speculative-decoding"]))


def draw_curves(log: pathlib.Path, picture: pathlib.Path, title: str) -> bool:
    """Draws log.jsonl as a PNG; returns whether matplotlib is there to do it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    measured = [line for line in lines if "acceptance" in line]
    figure = Figure(figsize=(9, 6 if measured else 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(2 if measured else 1, 2, squeeze=False)

    def draw(axis: Any, some: list[dict[str, Any]], values: list[float], colour: str = "#0072B2", **style: Any) -> None:
        axis.plot([line["iter"] for line in some], values, color=colour, **style)

    losses = [line["loss"] for line in lines]
    draw(axes[0, 0], lines, losses, "0.75", linewidth=0.8, label="every 10th update")
    draw(axes[0, 0], lines, _smoothed(losses), label="smoothed")
    axes[0, 0].set(ylabel="loss (nats)", title="Cross-entropy against the target")
    axes[0, 0].legend(frameon=False)
    for k in range(len(lines[0]["hits"]) if lines else 0):
        hits = _smoothed([100 * line["hits"][k] for line in lines])
        draw(axes[0, 1], lines, hits, COLOURS[k % len(COLOURS)], label=f"step {k + 1}")
    axes[0, 1].set(ylabel="first guess right (%)", title="Hits per draft step")
    axes[0, 1].legend(frameon=False, ncols=2)
    if measured:
        draw(axes[1, 0], measured, [line["acceptance"] for line in measured], marker="o", markersize=3)
        axes[1, 0].set(ylabel="tokens per step", title="Mean acceptance length, held-out prompts")
        draw(axes[1, 1], lines, [line["positions_per_second"] for line in lines])
        axes[1, 1].set(ylabel="tokens per second", title="Throughput, reading with the target included", ylim=(0, None))
    for axis in axes.flat:
        axis.set_xlabel("update")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    with replace_file(picture) as file:
        figure.savefig(file, dpi=120)
    return True


def _smoothed(values: list[float]) -> list[float]:
    """A running mean over about a twentieth of the run, corrected for its start."""
    mean, smooth = RunningShare(0, max(2, len(values) / 20)), []
    for value in values:
        mean.learn(value)
        smooth.append(mean.share(0))
    return smooth
