"""What is said of a finished drafter: figures measured as it will be used, its card, its curves."""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.system.device import on_cpu
from mlx_redrafter.system.files import replace_file
from mlx_redrafter.target.model import Target
from mlx_redrafter.training.acceptance_length import acceptance_length, held_out_prompts
from mlx_redrafter.training.card import command_line, model_card
from mlx_redrafter.training.curves import draw_curves
from mlx_redrafter.training.drafters.kinds import METHODS
from mlx_redrafter.training.resume import arguments_of, defaults
from mlx_redrafter.training.teacher import KL, Objective
from mlx_redrafter.training.text.shards import Rows
from mlx_redrafter.training.trainer import TrainingPlan, TrainingResult
from mlx_redrafter.training.vocabulary import coverage, vocab_map_of

EVALUATED_TOKENS = 64  # per prompt, at least


def report(
    args: argparse.Namespace,
    plan: TrainingPlan,
    result: TrainingResult,
    target: Target,
    rows: Rows,
    out: pathlib.Path,
) -> None:
    """Measures the finished drafter, as it will be read, on text that was kept out of training."""
    method, finished = METHODS[args.method], open_drafter(out)
    check_pair(target, finished)
    stored: dict[str, Any] = {"bytes": (out / "model.safetensors").stat().st_size, "dtype": args.dtype}
    stored["bytes_per_draft_step"] = finished.bytes_per_draft_step()
    if on_cpu() and finished.config.quantization is None:
        finished.set_dtype(mx.float32)
    (shape, drafted), prompts = method.shape(args), held_out_prompts(rows, args.prefix_length)
    tokens = max(EVALUATED_TOKENS, rows.length - len(prompts[0]))
    length = acceptance_length(target, finished, prompts, shape, tokens)
    measured = f"greedy, {drafted}"
    prefill = prefill_speed(target, rows, args.batch_size)
    facts: dict[str, Any] = {
        "mean_acceptance_length": round(length, 3),
        "measured": f"{measured}; {len(prompts)} held-out prompts, {tokens} tokens each",
        "objective": _in_words(plan.objective),
        "updates": result.updates,
        "batch_size": plan.batch_size,
        "best_while_training": result.best,
        "tokens_per_second": round(result.positions_per_second, 1),
        "target_tokens_per_second": round(prefill, 1),
        "prefill_ratio": round(result.positions_per_second / prefill, 3),
        "coverage": coverage(rows, vocab_map_of(finished)),
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
    }
    with replace_file(out / "training" / "result.json") as file:
        file.write_text(json.dumps(facts | stored | arguments_of(args), indent=1) + "\n")
    command = command_line(arguments_of(args), defaults())
    name = args.model or "the embedded target"
    with replace_file(out / "README.md") as file:
        file.write_text(model_card(name, method, finished, command, _text(rows), facts | stored))
    log, picture = out / "training" / "log.jsonl", out / "training" / "curves.png"
    drawn = draw_curves(log, picture, f"{method.title} for {name}")
    print(
        f"{out}: mean acceptance length {length:.2f} on {len(prompts)} held-out prompts ({measured})\n"
        f"{result.positions_per_second:.0f} tokens/s of text learned, {facts['prefill_ratio']:.2f} of the target's own"
        f" reading speed of {prefill:.0f} tokens/s"
    )
    print(f"{picture}" if drawn else "No curves were drawn: that takes matplotlib (pip install 'mlx-redrafter[bench]')")


def prefill_speed(target: Target, rows: Rows, batch_size: int, seconds: float = 1.0) -> float:
    """Tokens per second that the target reads, no logits computed, as when it reads a prompt."""
    tokens = mx.array(rows[np.arange(min(batch_size, len(rows)))][0])
    start, read = 0.0, -1
    while read < 1 or time.perf_counter() - start < seconds:
        if read == 0:  # the first pass was the warm-up
            start = time.perf_counter()
        cache = make_prompt_cache(target.model)
        target.forward(tokens, cache)
        mx.eval([layer.state for layer in cache])
        read += 1
    return read * tokens.size / (time.perf_counter() - start)


def _in_words(objective: Objective) -> str:
    labels = {
        KL: f"cross-entropy against the target's {objective.top_k or 'whole'} "
        f"{'most probable tokens' if objective.top_k else 'distribution'}"
        + (f" at temperature {objective.temperature}" if objective.temperature != 1 else ""),
        "hard": "cross-entropy with the target's most probable token",
        "text": "cross-entropy with the next token of the text",
    }[objective.labels]
    weights = ", ".join(f"{w:.2g}" for w in objective.step_weights)
    shares = ", ".join(f"{s:.2g}" for s in objective.step_shares)
    return (
        f"{labels}; {len(objective.step_weights)} draft steps, weights {weights}, at shares {shares} of the positions"
    )


def _text(rows: Rows) -> str:
    data = rows.manifest["settings"]["data"]
    source = {
        "self": "written by the target itself",
        "regenerated": "answers of the target",
    }.get(data[0], ", ".join(data))
    return f"{source}; {len(rows) - rows.held_out:,} rows of {rows.length} tokens"
