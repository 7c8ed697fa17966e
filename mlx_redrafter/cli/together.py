"""Runs a command in several processes that share a model: rank 0 speaks, the others are silent, and all do the same.

Knows nothing of what a command does. `train` knows about several processes itself.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import sys

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.ranks import LAUNCHED_TOGETHER, Ranks, connected

CAN = ("generate", "chat", "serve", "bench speed")
# What a process keeps or reads in files is what it has of a model, and what rank 0 was asked.
FILED = ("adapter_path", "prompt_cache_file", "prompt_cache_dir", "record_sessions")
ALONE = {name: f"--{name.replace('_', '-')}" for name in FILED}
NUMBERS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # of this process, as launchers note it
FILES = ("json_schema", "grammar")  # prompts are shared, and models compared as they are loaded
PACKAGES = ("mlx-redrafter", "mlx", "mlx-lm", "transformers", "tokenizers", "llguidance")
OURS = ("run", "parser", "api_key")  # what argparse keeps beside the flags, and a key, which no message may show

_voice: int | None = None  # standard error as it was


def quiet(command: str) -> None:
    """Lets this process print nothing if it is not the first; called before anything is printed."""
    global _voice
    rank = next((os.environ[name] for name in NUMBERS if name in os.environ), "0")
    if LAUNCHED_TOGETHER and rank != "0" and command != "train":
        _voice, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)


def ranks_for(args: argparse.Namespace) -> Ranks | None:
    """The processes, connected; None where there is one, or the command sees to that itself. Raises UserError."""
    if args.command == "train":
        return None
    if (ranks := connected()) is None and getattr(args, "pipeline", False) and args.command != "serve":
        raise UserError("--pipeline needs several processes (mlx.launch), found one")
    if ranks is not None and _voice is not None:
        ranks.voice = os.fdopen(_voice, "w")
    return ranks


def check(args: argparse.Namespace, ranks: Ranks) -> None:
    """Sees to it that all processes do the same, and that rank 0 alone writes files.

    Raises:
        UserError: a command or a flag that several processes cannot follow, or another rank that differs.
    """
    command = " ".join(filter(None, (args.command, getattr(args, "kind", None))))
    if command not in CAN:
        raise UserError(f"{command} runs in one process, found {ranks.size}; several can {', '.join(CAN)} and train")
    if found := [flag for name, flag in ALONE.items() if getattr(args, name, None)]:
        raise UserError(f"{found[0]} is for one process, found {ranks.size}")
    if getattr(args, "cost_scale", 1.0) != 1.0:
        raise UserError(f"--cost-scale {args.cost_scale} is for one process, found {ranks.size}")
    if getattr(args, "prompt", None) == "-":
        raise UserError("--prompt - is for one process: mlx.launch does not pass on the end of standard input")
    settings = {f"--{name.replace('_', '-')}": repr(value) for name, value in vars(args).items() if name not in OURS}
    ranks.check_same(versions() | settings | contents(args))
    if not ranks.first:
        args.out = None


def contents(args: argparse.Namespace) -> dict[str, str]:
    """Of the files that flags name, by flag: drafts are pruned by them on every process."""
    files = {name: pathlib.Path(getattr(args, name, None) or "") for name in FILES}
    return {
        f"the content of --{name.replace('_', '-')}": hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        for name, file in files.items()
        if file.is_file()  # what is missing is said later, by name
    }


def versions() -> dict[str, str]:
    """The code that computes, by name."""
    root = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.read_bytes())
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # llguidance is needed for constraints only
            found[name] = importlib.metadata.version(name)
    return found | {"Python": platform.python_version(), "the code of mlx-redrafter": digest.hexdigest()[:12]}


def end(ranks: Ranks, line: str, code: int) -> None:
    """Ends all processes if this one failed, else lets the others come to their end."""
    if not code:
        ranks.leave()
        return
    sys.stdout.flush()
    ranks.fail(line, code)
