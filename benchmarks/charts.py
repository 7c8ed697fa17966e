"""Draws charts in one style: labels with units, colours that colour-blind people can tell apart.

Knows nothing of what is drawn. matplotlib is imported only when a chart is drawn; it comes with the extra `bench`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_redrafter.errors import UserError

# Okabe and Ito's palette, black and yellow left out.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#555555"

Draw = Callable[[Any], None]  # draws on a matplotlib Figure


def require_matplotlib() -> None:
    """Raises UserError where there is none."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--out needs matplotlib for its charts: pip install 'mlx-redrafter[bench]'")


def save_chart(path: Any, title: str, subtitle: str, draw: Draw, size: tuple[float, float]) -> None:
    """Draws a chart to a PNG file.

    Args:
        title: what is shown.
        subtitle: device, type and whatever else the figures hold for.
        size: width and height in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.suptitle(f"{title}\n", fontsize=12, fontweight="bold")
    draw(figure)
    figure.text(0.5, 1 - 0.42 / size[1], subtitle, ha="center", va="center", fontsize=8, color=GREY)
    figure.savefig(path, format="png")


def plain_axes(axes: Any, xlabel: str, ylabel: str, title: str = "") -> None:
    """Labels, light lines behind the data, no frame above and to the right."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if title:
        axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def at(temp: float) -> str:
    """A temperature in words, as headings say it."""
    return f"temperature {temp:g}" if temp else "greedy"


@dataclasses.dataclass
class Bar:
    """A horizontal bar: its name and length, the quartiles to show on it, and a limit to mark."""

    name: str
    value: float
    low: float
    high: float
    is_reference: bool = False
    limit: float | None = None


def bars(figure: Any, panels: Mapping[str, Sequence[Bar]], xlabel: str, limit: str = "") -> None:
    """Panels beside one another, a bar per line of each, with a common scale and legend.

    Args:
        panels: by their headings.
        limit: what the mark at a bar's limit means; empty where no bar has one.
    """
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    all_axes[0].invert_yaxis()
    for axes, (heading, some) in zip(all_axes, panels.items()):
        for y, one in enumerate(some):
            axes.barh(y, one.value, color=GREY if one.is_reference else COLOURS[0], height=0.6)
            axes.plot([one.low, one.high], [y, y], color="black", linewidth=1.2, label="quartiles" if y == 0 else None)
            if one.limit is not None:
                first = all(other.limit is None for other in some[:y])
                label, ends = limit if first else None, [y - 0.38, y + 0.38]
                axes.plot([one.limit] * 2, ends, color=COLOURS[3], linewidth=2.5, label=label)
            axes.text(0.03, y, f"{one.value:.2f}x", va="center", color="white", fontsize=9)
        axes.set_yticks(range(len(some)), [one.name for one in some])
        plain_axes(axes, xlabel, "", heading)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def lines(axes: Any, series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """A line with markers for each name of (x, y) points."""
    for i, (name, points) in enumerate(series.items()):
        xs, ys = zip(*points)
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(xs, ys, color=colour, marker=marker, markersize=4, linewidth=1.5, label=name)
    if series:
        axes.legend(fontsize=8, frameon=False)


def doubling(axes: Any, ticks: Sequence[int]) -> None:
    """Lengths along x, every doubling as wide as the others and those measured named; y from zero."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)


def heat_map(
    figure: Any,
    axes: Any,
    values: list[list[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    labels: list[list[str]],
) -> None:
    """Values as colours with their labels in the cells; None leaves a cell empty."""
    import numpy as np

    table = np.array([[np.nan if v is None else v for v in row] for row in values], float)
    image = axes.imshow(np.ma.masked_invalid(table), cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    middle = (np.nanmin(table) + np.nanmax(table)) / 2
    for y, line in enumerate(labels):
        for x, label in enumerate(line):
            colour = "white" if table[y, x] <= middle else "black"
            axes.text(x, y, label, ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.9)
