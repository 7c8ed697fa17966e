"""Publishes results: tables on the terminal, and JSON, Markdown, a chart and a page in a directory.

Knows nothing of what was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shlex
from collections.abc import Callable
from typing import Any

from mlx_redrafter.benchmarks.charts import Draw, require_matplotlib, save_chart

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import replace_file
from mlx_redrafter.system.flag_types import typed
from mlx_redrafter.system.table import Table


@dataclasses.dataclass
class Report:
    """What a benchmark found.

    Attributes:
        kind: its name on the command line, and its files' name.
        title: what was measured.
        facts: what the figures hold for: device, versions, models, prompts.
        command: what was typed.
        tables: for people.
        notes: what each figure is.
        data: all figures, for programs; dataclasses become objects of the JSON.
        draw: the chart.
        size: of the chart, in inches.
        page: makes an HTML page of the JSON, KIND.html, where there is one.
    """

    kind: str
    title: str
    facts: dict[str, str]
    command: str
    tables: list[Table]
    notes: list[str]
    data: dict[str, Any]
    draw: Draw
    size: tuple[float, float] = (8.0, 4.5)
    page: Callable[[dict[str, Any]], str] | None = None

    def publish(self, out: str | None) -> None:
        """Prints the tables; writes KIND.json, KIND.md and KIND.png into a directory, each whole or not at all."""
        facts = "\n".join(f"{name}: {value}" for name, value in self.facts.items())
        print("\n\n".join([facts, *(table.text() for table in self.tables), "\n".join(self.notes)]))
        if out is None:
            return
        folder = pathlib.Path(out)
        whole = self.as_json()
        with replace_file(folder / f"{self.kind}.png") as file:
            short = f"{self.facts['device']}; {self.facts['target']}"
            save_chart(file, self.title, short, self.draw, self.size)
        texts = {"json": json.dumps(whole, indent=1) + "\n", "md": self._markdown()}
        if self.page is not None:
            texts["html"] = self.page(whole)
        for suffix, text in texts.items():
            with replace_file(folder / f"{self.kind}.{suffix}") as file:
                file.write_text(text, "utf-8")
        written = ", ".join(str(folder / f"{self.kind}.{suffix}") for suffix in ("png", *texts))
        print(f"\nWritten: {written}")

    def as_json(self) -> dict[str, Any]:
        whole = {"kind": self.kind, "command": self.command, "facts": self.facts, **self.data}
        return json.loads(json.dumps(whole, default=dataclasses.asdict))

    def _markdown(self) -> str:
        parts = [f"## {self.title}", f"    {self.command}", "\n".join(f"- {k}: {v}" for k, v in self.facts.items())]
        parts += [f"![{self.title}]({self.kind}.png)", *(table.markdown() for table in self.tables)]
        return "\n\n".join([*parts, *self.notes]) + "\n"


def check_out(out: str | None) -> None:
    """Raises UserError, before minutes of measuring, where results could not be written."""
    if out is None:
        return
    require_matplotlib()
    folder = pathlib.Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out}: is a file, expected a directory")
    made = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        with replace_file(made / ".mlx-redrafter-test") as file:
            file.touch()
        (made / ".mlx-redrafter-test").unlink()
    except UserError as error:
        raise UserError(f"--out {out}: cannot be written") from error


def command_line(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The command that gives these arguments, defaults left out."""
    given = (
        (name, value)
        for name, value in vars(args).items()
        if name not in ("command", "kind", "run", "parser") and value != parser.get_default(name)
    )
    return shlex.join(["mlx-redrafter", "bench", args.kind, *typed(given)])
