"""`mlx-redrafter sessions`: shows what was recorded for a later training, and deletes it."""

from __future__ import annotations

import argparse
import time
from typing import Any

from mlx_redrafter.system.table import Table
from mlx_redrafter.text.sessions import files

HELP = "show or delete what --record-sessions kept of questions and answers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--show", action="store_true", help="print every question and answer")
    what.add_argument("--delete", action="store_true", help="delete them all")


def run(args: argparse.Namespace) -> None:
    if args.delete:
        print(f"{files.folder()}: files deleted: {files.delete()}")
        return
    rows: list[dict[str, Any]] = []
    for path in files.files():
        records = files.read(path)
        last = records[-1] if records else {}
        facts = {"file": path.name, "answers": len(records), "kB": f"{path.stat().st_size / 1000:.1f}"}
        model = last.get("target", {}).get("name", "")
        rows.append(
            facts | {"model": model, "last": time.strftime("%Y-%m-%d %H:%M", time.localtime(last.get("time", 0)))}
        )
        for record in records if args.show else ():
            print(f"{path.name}\n{_said(record)}\n")
    if not rows:
        print(f"{files.folder()}: nothing is recorded (--record-sessions of chat, generate and serve does so)")
    elif not args.show:
        columns = {name: lambda row, name=name: str(row[name]) for name in rows[0]}
        print(Table.of(str(files.folder()), columns, rows).text())


def _said(record: dict[str, Any]) -> str:
    if "messages" in record:
        return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in record["messages"])
    return f"{record.get('prompt')}{record.get('completion')}"
