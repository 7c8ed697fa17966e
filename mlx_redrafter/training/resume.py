"""What an earlier run left, for those that go on from it: its flags, its rows, its weights."""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import mlx.core as mx

from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import read_json
from mlx_redrafter.target.model import Target
from mlx_redrafter.training.drafters.base import flag
from mlx_redrafter.training.drafters.kinds import METHODS
from mlx_redrafter.training.flags import add_arguments
from mlx_redrafter.training.text.rendering import Renderer
from mlx_redrafter.training.text.shards import Rows

# What may differ when a run goes on: it changes nothing that is learned.
FREE_TO_CHANGE = ("out", "resume", "upload_repo", "save_every", "cache_gb", "write_batch_size", "compile")


def arguments_of(args: argparse.Namespace) -> dict[str, Any]:
    """The flags, as JSON can keep them."""
    return {name: value for name, value in vars(args).items() if name not in ("run", "command", "resume")}


def defaults() -> dict[str, Any]:
    """What the flags are where nothing is said."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return vars(parser.parse_args(["--out", ""]))


def check_resumed(args: argparse.Namespace, file: pathlib.Path) -> None:
    """Raises UserError unless the run that wrote this file was begun with the same flags."""
    if not file.exists():
        raise UserError(f"--resume: {file} does not exist; there is no run to go on with")
    # A flag that there was not yet when the run began had what is its default now.
    begun, now = defaults() | read_json(file), json.loads(json.dumps(arguments_of(args)))
    for name, value in now.items():
        if name not in FREE_TO_CHANGE and begun[name] != value:
            raise UserError(f"{flag(name)} is {value}, but the run to resume has {begun[name]}")


def earlier_rows(path: str, target: Target, tokenizer: Any, beam_length: int) -> Rows:
    """Rows that an earlier run wrote. Raises UserError unless they are whole and for this tokenizer."""
    rows = Rows(path)
    if rows.manifest["settings"].get("tokenizer") != Renderer(tokenizer).fingerprint():
        raise UserError(f"--text {path}: its rows were cut by another tokenizer than the target's")
    if rows.length < beam_length + 2 or rows.held_out < 1:
        raise UserError(f"--text {path}: expected rows of {beam_length + 2} tokens or more, some of them held out")
    if target.context_length is not None and rows.length > target.context_length:
        raise UserError(f"--text {path}: rows of {rows.length} tokens, the target's context is {target.context_length}")
    return rows


def earlier_drafter(args: argparse.Namespace, target: Target) -> Any:
    """The drafter that --init names, in float32. Raises UserError unless it is one to go on from."""
    drafter, method = open_drafter(args.init), METHODS[args.method]
    if not isinstance(drafter, method.kind):
        raise UserError(f"--init {args.init}: is a drafter of another kind than --method {method.name}")
    method.check_init(args, drafter)
    check_pair(target, drafter, f"--init {args.init}")
    drafter.set_dtype(mx.float32)
    return drafter
