"""A picture of a run: loss, hits and acceptance over the updates."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from mlx_redrafter.system.files import replace_file


def draw_curves(log: pathlib.Path, picture: pathlib.Path, title: str) -> bool:
    """Draws log.jsonl as a PNG.

    Returns:
        False where matplotlib is not installed, and nothing is drawn.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    at = [line["iter"] for line in lines]
    measured = [(line["iter"], line["acceptance"]) for line in lines if "acceptance" in line]
    figure = Figure(figsize=(9, 3.2 if not measured else 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(2 if measured else 1, 2, squeeze=False)
    axes[0, 0].plot(at, [line["loss"] for line in lines], color="0.75", linewidth=0.8, label="every 10th update")
    axes[0, 0].plot(at, _smoothed([line["loss"] for line in lines]), color="#0072B2", label="smoothed")
    axes[0, 0].set(ylabel="loss (nats)", title="Cross-entropy against the target")
    axes[0, 0].legend(frameon=False)
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    for k in range(len(lines[0]["hits"]) if lines else 0):
        hits = _smoothed([100 * line["hits"][k] for line in lines])
        axes[0, 1].plot(at, hits, color=colours[k % len(colours)], label=f"step {k + 1}")
    axes[0, 1].set(ylabel="first guess right (%)", title="Hits per draft step")
    axes[0, 1].legend(frameon=False, ncols=2)
    if measured:
        axes[1, 0].plot(*zip(*measured, strict=True), marker="o", markersize=3, color="#0072B2")
        axes[1, 0].set(ylabel="tokens per step", title="Mean acceptance length, held-out prompts")
        axes[1, 1].plot(at, [line["positions_per_second"] for line in lines], color="#0072B2")
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
    keep = 1 - 1 / max(2, len(values) / 20)
    mean, weight, smooth = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(mean / weight)
    return smooth
