"""Pictures of a comparison as inline SVG: acceptance by position, and one step's tree."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_redrafter.benchmarks.html_parts import Fields, text, traced

# Of each series of the chart.
_MARKS = ("circle", "square", "triangle", "diamond")


def acceptance_chart(rows: Sequence[Fields], names: Sequence[str], deepest: int = 8) -> str:
    """Lines of the share of steps that got at least d draft tokens accepted, d along x."""
    deepest = min(deepest, max(len(row["by_position"]) for row in rows))
    width, height, left, top = 620, 260, 44, 12
    step = (width - left - 20) / max(1, deepest - 1)

    def x(d: int) -> float:
        return left + 10 + (d - 1) * step

    def y(share: float) -> float:
        return top + (1 - share) * (height - top - 40)

    parts = []
    for percent in (0, 25, 50, 75, 100):
        at = y(percent / 100)
        parts.append(f'<line class="grid" x1="{left}" x2="{width}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="small" x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{percent} %</text>')
    for d in range(1, deepest + 1):
        parts.append(f'<text class="small" x="{x(d):.1f}" y="{height - 22}" text-anchor="middle">{d}</text>')
    middle = (left + width) / 2
    below = "draft tokens accepted, or more"
    parts.append(f'<text class="small" x="{middle:.0f}" y="{height - 4}" text-anchor="middle">{below}</text>')
    for i, row in enumerate(rows):
        points = [(x(d + 1), y(share)) for d, share in enumerate(row["by_position"][:deepest])]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline class="series s{i % 8}" points="{line}"/>')
        for d, (px, py) in enumerate(points):
            where = traced(row, f"by_position[{d}]", "data-value")
            share = f"{text(names[i])}: {row['by_position'][d]:.0%} of the steps, {d + 1} or more"
            parts.append(f"<g {where}><title>{share}</title>{_mark(i, px, py)}</g>")
    keys = "".join(
        '<li><svg width="26" height="12" aria-hidden="true">'
        f'<line class="series s{i % 8}" x1="1" x2="25" y1="6" y2="6"/>'
        f"{_mark(i, 13, 6)}</svg>{text(name)}</li>"
        for i, name in enumerate(names)
    )
    return (
        f'<div class="scroll"><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
        f' aria-label="Acceptance by position">{"".join(parts)}</svg></div><ul class="legend">{keys}</ul>'
    )


def _mark(series: int, x: float, y: float) -> str:
    """A point's shape, so that series can be told apart without colours."""
    style = f'class="s{series % 8}" fill="var(--card)" stroke-width="2"'
    kind = _MARKS[series % len(_MARKS)]
    if kind == "circle":
        return f'<circle {style} cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>'
    if kind == "square":
        return f'<rect {style} x="{x - 3.3:.1f}" y="{y - 3.3:.1f}" width="6.6" height="6.6"/>'
    corners = [(0, -4.4), (4.2, 3.4), (-4.2, 3.4)] if kind == "triangle" else [(0, -4.6), (4.6, 0), (0, 4.6), (-4.6, 0)]
    return f'<polygon {style} points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)}"/>'


def tree_picture(nodes: Sequence[Fields]) -> str:
    """A step's tree from left to right; accepted nodes with a tick and whole lines, rejected ones dashed.

    Args:
        nodes: the root first, parents before children, as in the JSON.
    """
    column, line, wide, high = 158, 46, 128, 36
    children: dict[int, list[int]] = {i: [] for i in range(len(nodes))}
    for i, node in enumerate(nodes[1:], 1):
        children[node["parent"]].append(i)
    rows: dict[int, float] = {}
    leaves = 0

    def place(i: int) -> float:
        nonlocal leaves
        below = [place(child) for child in children[i]]
        if not below:
            leaves += 1
        rows[i] = sum(below) / len(below) if below else leaves - 1.0
        return rows[i]

    place(0)
    width = column * max(node["depth"] for node in nodes) + wide + 8
    height = line * leaves + 8
    links, boxes = [], []
    for i, node in enumerate(nodes):
        left, middle = 4 + node["depth"] * column, 4 + rows[i] * line + high / 2
        yes = "yes" if node["accepted"] else "no"
        if i:
            above = nodes[node["parent"]]
            from_x, from_y = 4 + above["depth"] * column + wide, 4 + rows[node["parent"]] * line + high / 2
            bend = (from_x + left) / 2
            links.append(
                f'<path class="link {yes}" d="M{from_x} {from_y:.1f} C{bend} {from_y:.1f} {bend} {middle:.1f}'
                f' {left} {middle:.1f}"/>'
            )
        shown = repr(node["text"])[1:-1].replace(" ", "␣")
        short = shown if len(shown) <= 15 else shown[:14] + "…"
        boxes.append(f"<g><title>{text(shown)}</title>" + _box(node, i, left, middle, wide, high, short, yes) + "</g>")
    return (
        f'<div class="scroll"><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
        f' aria-label="The tree of one step">{"".join(links + boxes)}</svg></div>'
    )


def _box(node: Fields, i: int, left: float, middle: float, wide: int, high: int, short: str, yes: str) -> str:
    parts = [
        f'<rect class="node {yes}" x="{left}" y="{middle - high / 2:.1f}" width="{wide}" height="{high}" rx="7"/>',
        f'<text class="mono" x="{left + 8}" y="{middle - 2:.1f}">{text(short)}</text>',
    ]
    if i == 0:
        parts.append(f'<text class="small" x="{left + 8}" y="{middle + 13:.1f}">the root</text>')
        return "".join(parts)
    mark, colour, word = ("✓", "good", "accepted") if node["accepted"] else ("✗", "bad", "rejected")
    share = ""
    if node["probability"] is not None:
        share = f"<tspan {traced(node, 'probability', 'data-value')}>{node['probability']:.0%}</tspan> "
    fate = f'<tspan class="{colour}">{mark} {word}</tspan>'
    parts.append(f'<text class="small" x="{left + 8}" y="{middle + 13:.1f}">{share}{fate}</text>')
    return "".join(parts)
