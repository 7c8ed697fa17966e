"""Tables as text and as Markdown; knows nothing of what is in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass
class Table:
    """Rows of short texts under headings; the first column is a name, the others are figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @classmethod
    def of(cls, title: str, columns: Mapping[str, Callable[[Any], str]], items: Iterable) -> Table:
        """A row for each item; `columns` says, by heading, what a cell shows of it."""
        return cls(title, list(columns), [[cell(item) for cell in columns.values()] for item in items])

    def text(self) -> str:
        widths = [max(len(str(line[i])) for line in (self.columns, *self.rows)) for i in range(len(self.columns))]
        lines = [self.title] if self.title else []
        for line in (self.columns, *self.rows):
            cells = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines + ([self.note] if self.note else []))

    def markdown(self) -> str:
        lines = [f"### {self.title}", ""] if self.title else []
        lines += [_row(self.columns), _row(["---", *["---:"] * (len(self.columns) - 1)])]
        lines += [_row(row) for row in self.rows]
        return "\n".join(lines + (["", self.note] if self.note else []))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
