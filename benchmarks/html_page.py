"""The page of a comparison: one file that needs nothing else, readable in light and dark and on a phone."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from typing import Any

from mlx_redrafter.benchmarks.contest import REDRAFTER
from mlx_redrafter.benchmarks.findings import at, title
from mlx_redrafter.benchmarks.html_parts import Fields, bars, figure, table, text
from mlx_redrafter.benchmarks.html_pictures import acceptance_chart, tree_picture
from mlx_redrafter.benchmarks.methods import PLAIN
from mlx_redrafter.benchmarks.report import Report
from mlx_redrafter.benchmarks.rows import ALL, Row


def page(report: Report, said: Sequence[tuple[str, list[Row]]], equality: str, notes: Sequence[str]) -> str:
    """The whole page.

    Args:
        report: with the rows of its data.
        said: sentences, and the rows that each is about.
        equality: how many texts were the plain ones.
        notes: what each figure is.
    """
    rows: list[Fields] = report.data["rows"]
    temps = list(dict.fromkeys(row["temp"] for row in rows))
    parts = [_head(report), _words(said, equality, report.data["left_out"])]
    parts += [_temperature(temp, [row for row in rows if row["temp"] == temp]) for temp in temps]
    parts += [_search(report.data["search"]), _tree(report.data["tree"]), _published(report.data["published"])]
    parts.append(_how(report, notes))
    css = importlib.resources.files(__package__).joinpath("report.css").read_text("utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{text(report.title)}</title><style>{css}</style></head>\n'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(report: Report) -> str:
    facts = report.facts
    shown = [facts[name] for name in ("target", "texts", "device") if name in facts]
    return f'<h1>{text(report.title)}</h1><p class="soft">{text(". ".join(shown))}.</p>'


def _words(said: Sequence[tuple[str, list[Row]]], equality: str, left_out: Sequence[str]) -> str:
    def item(sentence: str, rows: list[Row]) -> str:
        return f'<li data-rows="{text(" ".join(row.id for row in rows))}">{text(sentence)}</li>'

    whole = "".join(item(*one) for one in said if one[1][0].category == ALL)
    kinds = "".join(item(*one) for one in said if one[1][0].category != ALL)
    more = (
        f'<details open><summary>By kind of text</summary><ul class="findings">{kinds}</ul></details>' if kinds else ""
    )
    missing = "".join(f'<p class="note">{text(sentence)}</p>' for sentence in left_out)
    return (
        f'<h2>In words</h2><div class="card"><ul class="findings">{whole}</ul>{more}'
        f"<p>{text(equality)}</p>{missing}</div>"
    )


def _name(row: Fields) -> str:
    """A method with its setting."""
    setting = row["setting"]
    words = f"{setting} draft tokens" if setting.isdigit() else setting if setting not in ("", "auto") else ""
    return text(title(row["method"])) + (f" <small>{text(words)}</small>" if words else "")


def _kind(row: Fields) -> str:
    return "plain" if row["method"] == PLAIN else "ours" if row["method"] in REDRAFTER else "theirs"


def _temperature(temp: float, rows: list[Fields]) -> str:
    whole = [row for row in rows if row["category"] == ALL]
    drafting = [row for row in whole if row["method"] != PLAIN]
    columns = ["method", "tokens/s", "speed-up", "quartiles", "acceptance", "drafter MB", "memory MB",
        "first token ms", "equal"]  # fmt: skip
    lines = [
        [
            _name(row),
            figure(row, "tokens_per_second", ".1f"),
            figure(row, "speed_up", ".2f"),
            f"{figure(row, 'speed_up_low', '.2f')} to {figure(row, 'speed_up_high', '.2f')}",
            figure(row, "acceptance", ".2f"),
            figure(row, "drafter_bytes", ".1f", 1e-6),
            figure(row, "memory_bytes", ".1f", 1e-6),
            figure(row, "first_token", ".1f", 1e3),
            f"{figure(row, 'equal', '.0f')} of {figure(row, 'runs', '.0f')}",
        ]
        for row in whole
    ]
    fastest = max(range(len(whole)), key=lambda i: whole[i]["tokens_per_second"])
    legend = " &nbsp; ".join(
        f'<span class="key {kind}"></span>{name}'
        for kind, name in (("ours", "ReDrafter"), ("theirs", "other methods"), ("plain", "plain mlx_lm"))
    )
    return (
        f"<h2>{text(at(temp).capitalize())}</h2>"
        '<div class="card"><h3>Speed-up over plain mlx_lm</h3>'
        f"{bars(whole, [_name(row) for row in whole], [_kind(row) for row in whole])}"
        f'<p class="note">{legend}<br>Median over texts; the thin line spans the quartiles, the dashed line'
        " is 1.</p></div>"
        f'<div class="card">{table(columns, lines, marked=[(fastest, 1)])}</div>'
        f'<div class="card"><h3>Acceptance by position</h3>'
        f"{acceptance_chart(drafting, [title(row['method']) for row in drafting])}"
        f"<details><summary>The same as numbers</summary>{_positions(drafting)}</details></div>"
        f"{_categories(rows)}"
    )


def _positions(rows: list[Fields]) -> str:
    deepest = min(8, max(len(row["by_position"]) for row in rows))
    lines = [[_name(row), *(figure(row, f"by_position[{d}]", ".0%") for d in range(deepest))] for row in rows]
    return table(["method", *(str(d + 1) for d in range(deepest))], lines)


def _categories(rows: list[Fields]) -> str:
    """Speed-up of each method on each kind of text, the fastest of each kind marked."""
    kinds = [kind for kind in dict.fromkeys(row["category"] for row in rows) if kind != ALL]
    if not kinds:
        return ""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    cells = {(row["category"], row["method"]): row for row in rows}
    lines = [[text(kind), *(figure(cells[kind, name], "speed_up", ".2f") for name in methods)] for kind in kinds]
    marked = [
        (y, 1 + max(range(len(methods)), key=lambda x: cells[kind, methods[x]]["tokens_per_second"]))
        for y, kind in enumerate(kinds)
    ]
    heading = "<h3>Median speed-up by kind of text; the most tokens per second marked</h3>"
    return f'<div class="card">{heading}{table(["", *map(title, methods)], lines, marked=marked)}</div>'


def _search(tried: list[Fields]) -> str:
    lines = [
        [
            text(title(one["method"])),
            text(one["setting"]),
            text(at(one["temp"])),
            figure(one, "tokens_per_second", ".1f"),
            figure(one, "acceptance", ".2f"),
            "best" if one["best"] else "",
        ]
        for one in tried
    ]
    marked = [(y, 3) for y, one in enumerate(tried) if one["best"]]
    inner = table(["method", "setting", "", "tokens/s", "acceptance", ""], lines, words=3, marked=marked)
    return (
        "<h2>How each method found its best setting</h2>"
        '<div class="card"><p>Every setting wrote a few of the prompts; the fastest took part above.</p>'
        f"<details><summary>All {len(tried)} that were tried</summary>{inner}</details></div>"
    )


def _tree(tree: dict[str, Any] | None) -> str:
    if tree is None:
        return ""
    before = text(tree["before"][-220:])
    return (
        '<h2>One step, looked at</h2><div class="card"><p>The text so far, greedy, ends like this:</p>'
        f"<pre>{before}</pre>"
        "<p>The target has chosen the root. ReDrafter proposes what may follow, each word with its probability given"
        " the words before it; the target reads all of it in one pass and keeps the path that it would have"
        " written.</p>"
        f"{tree_picture(tree['nodes'])}"
        f'<p class="note">{text(tree["shape"])}. Thick lines and ticks: accepted; dashed: rejected. After the accepted'
        f" path the target's own next word is <code>{text(repr(tree['own']))}</code>.</p></div>"
    )


def _published(published: list[Fields]) -> str:
    lines = []
    for one in published:
        acceptance = "" if one["acceptance"] is None else figure(one, "acceptance", ".2f")
        link = f'<a href="{text(one["url"])}">{text(one["source"])}</a>'
        words = [text(one[name]) for name in ("method", "hardware", "target", "texts")]
        lines.append([*words, figure(one, "speed_up", ".2f"), acceptance, link])
    columns = ["method", "hardware", "target", "texts", "speed-up", "tokens per step", "source"]
    return (
        "<h2>Published elsewhere</h2>"
        '<div class="card"><p><strong>Not measured here.</strong> Figures of the ReDrafter paper and of Apple\'s MLX'
        " report, on their hardware and models, each against its authors' own plain decoding.</p>"
        f"{table(columns, lines, words=4)}</div>"
    )


def _how(report: Report, notes: Sequence[str]) -> str:
    facts = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in report.facts.items())
    items = "".join(f"<li>{text(note)}</li>" for note in notes)
    return (
        f'<h2>How this was measured</h2><div class="card"><pre>{text(report.command)}</pre><dl>{facts}</dl>'
        f'<ul class="findings note">{items}</ul><p class="note">Every figure on this page names its row of'
        f" {text(report.kind)}.json in its <code>data-row</code> and <code>data-field</code>.</p></div>"
    )
