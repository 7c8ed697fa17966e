"""Pieces of an HTML page: figures that name their row, tables, bars.

Every figure carries the id of the row of the JSON that it is from (`data-row`), the field
(`data-field`) and the field's own value (`value`, or `data-value` in a picture).
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

Fields = dict[str, Any]  # one row of the JSON


def text(words: object) -> str:
    return html.escape(str(words))


def value_of(row: Fields, field: str) -> float:
    """A row's field; `name[i]` is item i of a list, 0 behind its end."""
    name, _, index = field.partition("[")
    if not index:
        return float(row[name])
    items, i = row[name], int(index[:-1])
    return float(items[i]) if i < len(items) else 0.0


def traced(row: Fields, field: str, attribute: str = "value") -> str:
    """The attributes that say where a figure is from."""
    return f'data-row="{text(row["id"])}" data-field="{text(field)}" {attribute}="{value_of(row, field)!r}"'


def figure(row: Fields, field: str, form: str, scale: float = 1.0) -> str:
    """A figure as text.

    Args:
        form: how to write it, as in `format`.
        scale: it is multiplied by this for people.
    """
    return f"<data {traced(row, field)}>{text(format(value_of(row, field) * scale, form))}</data>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1, marked: Sequence[Any] = ()) -> str:
    """A table of cells that are HTML already.

    Args:
        words: so many columns from the left hold words.
        marked: (row, column) pairs of cells to stand out.
    """

    def cell(y: int, x: int, content: str, tag: str) -> str:
        kinds = [kind for kind, on in (("word", x < words), ("win", (y, x) in marked)) if on]
        style = f' class="{" ".join(kinds)}"' if kinds else ""
        return f"<{tag}{style}>{content}</{tag}>"

    def line(y: int, cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(cell(y, x, content, tag) for x, content in enumerate(cells)) + "</tr>"

    head = line(-1, [text(name) for name in columns], "th")
    body = "".join(line(y, cells, "td") for y, cells in enumerate(rows))
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def bars(rows: Sequence[Fields], names: Sequence[str], kinds: Sequence[str]) -> str:
    """A bar per row as long as its speed-up, with its quartiles, and a line at plain decoding's 1.

    Args:
        names: of the rows, HTML.
        kinds: "ours", "theirs" or "plain".
    """
    most = max([1.0, *(row["speed_up_high"] for row in rows), *(row["speed_up"] for row in rows)])
    share = 80 / most  # room for the figure beside the longest
    parts = []
    for row, name, kind in zip(rows, names, kinds, strict=True):
        low, high, middle = (row[f"speed_up{end}"] * share for end in ("_low", "_high", ""))
        parts.append(
            f'<div class="name">{name}</div><div class="track"><div class="one" style="left:{share:.2f}%"></div>'
            f'<div class="bar {kind}" style="width:{middle:.2f}%"></div>'
            f'<div class="quartiles" style="left:{low:.2f}%;width:{high - low:.2f}%"></div>'
            f'<div class="value" style="left:{max(high, middle):.2f}%">{figure(row, "speed_up", ".2f")}x</div></div>'
        )
    return f'<div class="bars">{"".join(parts)}</div>'
