"""Makes a comparison's page from its JSON: one file that needs nothing else, for light and dark and a phone.

Knows nothing of how the figures were measured. Every figure carries the id of the row of the JSON that it is from
(`data-row`), the field (`data-field`) and the field's own value (`value`, or `data-value` in a picture).
"""

from __future__ import annotations

import importlib.resources
import io
import json
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup
from mlx_redrafter.benchmarks import charts
from mlx_redrafter.benchmarks.competitors import PLAIN, REDRAFTER
from mlx_redrafter.benchmarks.page.rows import ALL, Row
from mlx_redrafter.benchmarks.page.verdicts import equality, findings, setting_words, title

Fields = dict[str, Any]  # one row of the JSON
DEEPEST = 8  # positions of the drafts that are shown
INK, GRID = "#123456", "#dddddd"  # as drawn; the page's own colours take their place

# Figures that others published, with their hardware and source. None of them was measured here.
PUBLISHED: list[Fields] = json.loads(
    importlib.resources.files(__package__).joinpath("published.json").read_text("utf-8")
)


def page(data: dict[str, Any], heading: str, notes: Sequence[str]) -> str:
    """The whole page.

    Args:
        data: what compare.json holds.
        heading: what was compared.
        notes: what each figure is.
    """
    files = importlib.resources.files(__package__)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"value_of": value_of, "title": title, "setting_words": setting_words, "at": charts.at}
    template = environment.from_string(files.joinpath("template.html.j2").read_text("utf-8"))
    rows = [Row(**fields) for fields in data["rows"]]
    said = findings(rows)
    return template.render(
        data | {"notes": notes, "title_of_page": heading, "equality": equality(rows)},
        css=files.joinpath("report.css").read_text("utf-8"),
        said=[one for one in said if one[1][0].category == ALL],
        said_of_kinds=[one for one in said if one[1][0].category != ALL],
        parts=[_part(temp, data["rows"]) for temp in dict.fromkeys(row.temp for row in rows)],
        picture=None
        if data["tree"] is None
        else tree_picture(data["tree"]["nodes"]) | {"own": repr(data["tree"]["own"])},
    )


def value_of(row: Fields, field: str) -> float:
    """A row's field; `name[i]` is item i of a list, 0 behind its end."""
    name, _, index = field.partition("[")
    if not index:
        return float(row[name])
    items, i = row[name], int(index[:-1])
    return float(items[i]) if i < len(items) else 0.0


def _part(temp: float, every: list[Fields]) -> dict[str, Any]:
    """What the template shows of one temperature."""
    rows = [row for row in every if row["temp"] == temp]
    whole = [row for row in rows if row["category"] == ALL]
    drafting = [row for row in whole if row["method"] != PLAIN]
    most = max([1.0, *(row["speed_up_high"] for row in whole), *(row["speed_up"] for row in whole)])
    kinds = [kind for kind in dict.fromkeys(row["category"] for row in rows) if kind != ALL]
    by_kind = {kind: [row for row in rows if row["category"] == kind] for kind in kinds}
    return {
        "temp": temp,
        "rows": whole,
        "kind_of": {row["method"]: _kind(row["method"]) for row in whole},
        "fastest": _fastest(whole),
        "share": 80 / most,  # percent of the width for a speed-up of 1, with room for the figure beside the longest
        "drafting": drafting,
        "deepest": min(DEEPEST, max(len(row["by_position"]) for row in drafting)),
        "chart": acceptance_chart(drafting),
        "by_kind": {kind: (some, _fastest(some)) for kind, some in by_kind.items()},
    }


def _kind(method: str) -> str:
    return "plain" if method == PLAIN else "ours" if method in REDRAFTER else "theirs"


def _fastest(rows: list[Fields]) -> str:
    """The id of the row with the most tokens per second."""
    return str(max(rows, key=lambda row: row["tokens_per_second"])["id"])


def acceptance_chart(rows: Sequence[Fields]) -> Markup:
    """Lines of the share of steps that got at least d draft tokens accepted, d along x, as inline SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "page", "text.color": INK, "axes.labelcolor": INK}
    style |= {"axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK}
    file = io.StringIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.5, 3.6), layout="constrained")
        axes = figure.subplots()
        points = {title(row["method"]): list(enumerate(row["by_position"][:DEEPEST], 1)) for row in rows}
        charts.lines(axes, {name: [(d, 100 * share) for d, share in some] for name, some in points.items() if some})
        charts.plain_axes(axes, "draft tokens accepted, or more", "steps (%)")
        axes.set_ylim(0, 100)
        if axes.get_legend() is not None:
            axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(GRID, "var(--line)")
    return Markup(svg.replace("<svg ", '<svg class="chart" role="img" ', 1))


def tree_picture(nodes: Sequence[Fields]) -> dict[str, Any]:
    """Where a step's nodes lie, from left to right, and the curves between them.

    Args:
        nodes: the root first, parents before children, as in the JSON.
    """
    column, line, wide, high = 158, 46, 128, 36
    children: dict[int, list[int]] = {i: [] for i in range(len(nodes))}
    for i, node in enumerate(nodes[1:], 1):
        children[node["parent"]].append(i)
    lines: dict[int, float] = {}
    leaves = 0

    def place(i: int) -> float:
        nonlocal leaves
        below = [place(child) for child in children[i]]
        leaves += not below
        lines[i] = sum(below) / len(below) if below else leaves - 1.0
        return lines[i]

    place(0)
    boxes = []
    for i, node in enumerate(nodes):
        left, middle = 4 + node["depth"] * column, 4 + lines[i] * line + high / 2
        start, above = 4 + (node["depth"] - 1) * column + wide, 4 + lines[node["parent"]] * line + high / 2
        bend = (start + left) / 2
        curve = f"M{start} {above:.1f} C{bend} {above:.1f} {bend} {middle:.1f} {left} {middle:.1f}"
        text = repr(node["text"])[1:-1].replace(" ", "␣")
        short = text if len(text) <= 15 else text[:14] + "…"
        boxes.append({"node": node, "left": left, "middle": middle, "curve": curve, "text": text, "short": short})
    size = column * max(node["depth"] for node in nodes) + wide + 8, line * leaves + 8
    return {"boxes": boxes, "size": size, "wide": wide, "high": high}
