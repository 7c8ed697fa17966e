"""Finds what an earlier run left, for those that go on from it: its flags and its rows.

Knows nothing of the training loop.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
from typing import Any

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import read_json
from mlx_redrafter.system.flag_types import flag
from mlx_redrafter.target.model import Target
from mlx_redrafter.training.drafters.recipes import RECIPES, follow
from mlx_redrafter.training.flags import add_arguments
from mlx_redrafter.training.text.data_plan import REGENERATED, SELF, SESSIONS
from mlx_redrafter.training.text.rendering import Renderer
from mlx_redrafter.training.text.shards import Rows

# What may change when a run goes on: how long, how it is watched and kept, where it runs.
FREE_TO_CHANGE = (
    *("out", "resume", "upload_repo", "trust_remote_code", "iters", "eval_every", "patience", "save_every"),
    "expected",
    *("cache_gb", "write_batch_size", "grad_accumulation", "compile", "dtype"),
)


def arguments_of(args: argparse.Namespace) -> dict[str, Any]:
    """The flags, as JSON can keep them."""
    return {name: value for name, value in vars(args).items() if name not in ("run", "command", "resume", "given")}


def defaults() -> dict[str, Any]:
    """The flags' values where none is given."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return vars(parser.parse_args(["--out", ""]))


def resumed(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of the run in --out, with what this command changes of them.

    Before the first checkpoint everything may change but the text, which is compared when it
    is written on; after it what is FREE_TO_CHANGE.

    Raises:
        UserError: no run there, or a flag that may not change, by its name.
    """
    notes = pathlib.Path(args.out) / "training"
    file = notes / "arguments.json"
    if not file.exists():
        raise UserError(f"--resume: {file} does not exist; there is no run to go on with")
    stored, parser = read_json(file), argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    # A flag that there was not yet when the run began has its default; numbers as text go through the flag's type.
    texts = {name: str(value) if type(value) in (int, float) else value for name, value in stored.items()}
    if isinstance(texts.get("text"), str):  # of a run from when there was one folder only
        texts["text"] = [texts["text"]]
    texts.setdefault("recipe", "plain")  # there was no other
    parser.set_defaults(**{name: texts[name] for name in texts.keys() & defaults().keys() if texts[name] is not None})
    try:
        flags = vars(parser.parse_args([f"--out={args.out}"]))
    except argparse.ArgumentError as error:
        raise UserError(f"{file}: {error.argument_name} {error.message}") from error
    begun, changed = (notes / "checkpoint.safetensors").exists(), False
    for name in sorted(args.given):
        value = json.loads(json.dumps(getattr(args, name)))
        if name not in FREE_TO_CHANGE and flags[name] != value:
            if begun:
                raise UserError(
                    f"{flag(name)} is {value}, but the run to resume has {flags[name]}; such a change needs a new --out"
                )
            changed = True
        flags[name] = value
    if flags["recipe"] != texts["recipe"]:
        forgotten = {name: defaults()[name] for name in RECIPES[texts["recipe"]].keys() - args.given}
        new = argparse.Namespace(**flags | forgotten | {"given": args.given})
        follow(new)
        flags = vars(new)
    if changed:  # the target's readings are those of the old flags
        for readings in notes.glob("readings-*"):
            shutil.rmtree(readings, ignore_errors=True)
    return argparse.Namespace(**vars(args) | flags | {"given": args.given})


def forget(out: pathlib.Path, notes: pathlib.Path, args: argparse.Namespace, error: UserError) -> None:
    """Removes what a run left that failed while its text was made, so that the corrected command can begin.

    Text that the target wrote stays, and so do rows of files where it was the disk that failed.
    """
    written = any((notes / "text").glob("shard-*.npy"))
    if written and (args.data[0] in (SELF, REGENERATED, SESSIONS) or isinstance(error.__cause__, OSError)):
        return
    shutil.rmtree(notes, ignore_errors=True)
    if out.exists() and not any(out.iterdir()):
        out.rmdir()


def earlier_rows(paths: list[str], target: Target, tokenizer: Any, steps: int) -> Rows:
    """Rows that earlier runs wrote. Raises UserError unless they are whole and fit the tokenizer and the steps."""
    rows, path = Rows(*paths), " ".join(paths)
    if any(m["settings"].get("tokenizer") != Renderer(tokenizer).fingerprint() for m in rows.manifests):
        raise UserError(f"--text {path}: its rows were cut by another tokenizer than the target's")
    if rows.length < steps + 3 or rows.held_out < 1:
        raise UserError(f"--text {path}: expected rows of {steps + 3} tokens or more, some of them held out")
    if target.context_length is not None and rows.length > target.context_length:
        raise UserError(f"--text {path}: rows of {rows.length} tokens, the target's context is {target.context_length}")
    return rows
