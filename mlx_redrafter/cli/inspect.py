"""`mlx-redrafter inspect`: what a directory is, what it lacks, and what it would cost to run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import time

import mlx.core as mx

from mlx_redrafter.convert.inspection import Inspection, inspect_directory
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.flag_types import real
from mlx_redrafter.system.hub import snapshot_of
from mlx_redrafter.text.loading import place_of

HELP = "say what a directory is, what it lacks and what it would cost to run"
_ARTICLES = {"adapter": "an adapter", "unknown": "nothing that is known here"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("path", metavar="PATH", help="look at this directory (a target, a drafter or adapters) or GGUF file")
    add("--gguf", metavar="NAME", help="read this GGUF file, named in full or in part, where PATH has several")
    add("--bandwidth", type=real(0.001), metavar="GB/S", help="reckon with this memory bandwidth (default: measure"
        " this machine's)")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object, and nothing else")
    add("--trust-remote-code", action="store_true", help="run the Python code that the model's directory brings along")


def run(args: argparse.Namespace) -> None:
    folder = pathlib.Path(place_of(args.path, "PATH", args.gguf)).expanduser()
    if not folder.is_dir():
        raise UserError(f"{args.path}: {'is a file, expected a directory' if folder.exists() else 'no such directory'}")
    found = inspect_directory(snapshot_of(folder), args.trust_remote_code)
    rate = None
    if found.bytes_per_step is not None:
        rate = args.bandwidth or measured_bandwidth()
    print(json.dumps(report(found, rate), indent=2) if args.json else text(found, rate, args.bandwidth is None))


def report(found: Inspection, rate: float | None) -> dict:
    """What `--json` prints. `rate` is in GB/s."""
    fields = dataclasses.asdict(found) | {"runnable": found.runnable}
    if rate is not None and found.bytes_per_step is not None:
        fields |= {"bandwidth_gb_s": round(rate, 2), "least_ms_per_step": found.bytes_per_step / rate / 1e6}
    return fields


def text(found: Inspection, rate: float | None, measured: bool) -> str:
    """The same for people."""
    head = _ARTICLES.get(found.kind) or f"a{'n' if found.kind[0] in 'aeiou' else ''} {found.kind}"
    rows = [("lacks", line) for line in found.lacks or ["nothing"]]
    if found.files:
        files = f"{found.files} file{'s' if found.files > 1 else ''}"
        rows.append(("weights", f"{size(found.weight_bytes)} in {files}"))
    if found.parameters:
        types = ", ".join(f"{size(count)} {name}" for name, count in found.weight_types.items())
        rows.append(("parameters", f"{found.parameters / 1e6:,.1f} million: {types}"))
    if found.cache_bytes:
        rows.append(("KV cache", ", ".join(f"{size(b)} at {n:,} tokens" for n, b in found.cache_bytes.items())))
    if found.bytes_per_step is not None and rate is not None:
        least = found.bytes_per_step / rate / 1e6
        rows.append(("read per step", f"{size(found.bytes_per_step)} {found.step}".rstrip()))
        where = "measured here" if measured else "as given"
        rows.append(("cost", f"at least {least:.3g} ms per step, at {rate:.1f} GB/s ({where})"))
    if found.parameters:
        memory = sum(found.weight_types.values()) + min(found.cache_bytes.values(), default=0)
        rows.append(("memory", f"{size(memory)}{_of_memory(memory)}"))
    rows += [("remark", line) for line in found.remarks]
    lines = [f"{found.path}: {head}{f' ({found.about})' if found.about else ''}"]
    return "\n".join([*lines, *(f"  {name:<14} {value}" for name, value in rows)])


def size(count: float) -> str:
    """Bytes for people, in powers of 1,000 as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _of_memory(needed: int) -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f", more than the {size(total)} of this machine" if needed > total else f" of this machine's {size(total)}"


def measured_bandwidth() -> float:
    """GB/s at which this machine reads a matrix for one product with a vector, which is what decoding does."""
    matrix, vector = mx.ones((4096, 8192)), mx.ones((8192, 1))
    mx.eval(matrix, vector, matrix @ vector)
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        mx.eval(matrix @ vector)
        best = min(best, time.perf_counter() - begin)
    return matrix.nbytes / best / 1e9
