"""Measures what a server adds: `serve` over HTTP beside `generate`, the same prompts and texts.

Both run in processes of their own and take turns, with one client; nothing is cached from one
request to the next. `generate` is this process. Knows nothing of the server's inside.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from mlx_redrafter.benchmarks import charts
from mlx_redrafter.benchmarks.compare import Spread, turn_order
from mlx_redrafter.benchmarks.flags import add_common_arguments, add_text_arguments, check_texts
from mlx_redrafter.benchmarks.pair import Pair, encode_texts, load_pair
from mlx_redrafter.benchmarks.report import Report
from tqdm import tqdm

from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.flag_types import whole
from mlx_redrafter.system.table import Table
from mlx_redrafter.text.generate import stream_generate

HELP = "what a server adds to generate, with one client"

NOTES = [
    "first token: milliseconds from the request to the first piece of text, median",
    "tokens/s: from the first piece to the last, median over the texts",
    "x: generate's time over serve's on the same text, median and quartiles (25 %, 75 %)",
    "equal: texts that are generate's",
]
GENERATE, SERVE = "generate", "serve"
SERVE_FLAGS = ["--port", "0", "--lookup", "off", "--prompt-cache-size", "0"]


@dataclasses.dataclass
class Timed:
    """One text: seconds to its first piece and from there to the last, and its number of tokens."""

    first: float
    rest: float
    tokens: int
    text: str

    @property
    def rate(self) -> float:
        return (self.tokens - 1) / self.rest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    add_text_arguments(parser, prompts=10)
    parser.add_argument("--num-draft-tokens", type=whole(1), default=3, metavar="N", help="draft a chain of this length"
        " (default: %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> Report:
    prompts = check_texts(args)
    if args.cost_scale != 1:
        raise UserError("--cost-scale: a server loads its target as it is, expected 1")
    shape = DraftShape(beam_width=1, beam_length=args.num_draft_tokens + 1, num_draft_tokens=args.num_draft_tokens)
    pair = load_pair(args, baseline=False)
    pair.check_shapes([shape])
    texts = encode_texts(args, pair, prompts)
    runs: dict[str, list[Timed]] = {GENERATE: [], SERVE: []}
    with _server(args) as port:
        for turn, prompt in enumerate(tqdm([texts[0], *texts], desc="measuring", unit="text", leave=False)):
            for name in turn_order([GENERATE, SERVE], turn):
                one = (
                    _generated(pair, prompt, shape, args.max_tokens)
                    if name == GENERATE
                    else _served(port, prompt, args)
                )
                if turn:  # the first text warms up
                    runs[name].append(one)
    pairs = list(zip(runs[GENERATE], runs[SERVE]))
    ratios = {
        "first token": Spread.of([ours.first / served.first for ours, served in pairs]),
        "tokens/s": Spread.of([served.rate / ours.rate for ours, served in pairs]),
    }
    equal = sum(ours.text == served.text for ours, served in pairs)
    rows = []
    for name, timed in runs.items():
        first, rate = (statistics.median(getattr(one, what) for one in timed) for what in ("first", "rate"))
        rows.append([name, f"{1e3 * first:.1f}", f"{rate:.1f}"])
    table = Table("side by side", ["", "first token (ms)", "tokens/s"], rows)
    share = Table(
        "serve beside generate",
        ["", "x", "25 %", "75 %"],
        [[name, *(f"{value:.3f}" for value in vars(spread).values())] for name, spread in ratios.items()],
        f"equal: {equal}/{len(texts)}",
    )

    def draw(figure: Any) -> None:
        bars = [charts.Bar(name, one.median, one.low, one.high) for name, one in ratios.items()]
        charts.bars(figure, {"one client": bars}, "generate's time over serve's (median over texts)", "")

    data = {"runs": runs, "ratios": ratios, "equal": equal}
    title = "What a server adds"
    return Report("serve", title, pair.facts, pair.command, [table, share], NOTES, data, draw, (7.0, 3.0))


def _generated(pair: Pair, prompt: list[int], shape: DraftShape, max_tokens: int) -> Timed:
    start, first, pieces = time.perf_counter(), 0.0, []
    for piece in stream_generate(
        pair.model, pair.tokenizer, prompt, pair.drafter, max_tokens=max_tokens, shape=shape, lookup="off"
    ):
        pieces.append(piece.text)
        first = first or (time.perf_counter() if piece.text else 0.0)
    end = time.perf_counter()
    return Timed(first - start, end - first, len(pieces), "".join(pieces))


def _served(port: int, prompt: list[int], args: argparse.Namespace) -> Timed:
    asked = {"prompt": prompt, "max_tokens": args.max_tokens, "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    with contextlib.closing(connection):
        start, first, text, tokens = time.perf_counter(), 0.0, "", 0
        body = json.dumps(asked | {"stream_options": {"include_usage": True}})
        connection.request("POST", "/v1/completions", body)
        for line in connection.getresponse():
            if not line.startswith(b"data: {"):
                continue
            piece = json.loads(line.removeprefix(b"data: "))
            text += "".join(choice["text"] for choice in piece["choices"])
            first = first or (time.perf_counter() if text else 0.0)
            tokens = (piece.get("usage") or {}).get("completion_tokens", tokens)
        end = time.perf_counter()
    return Timed(first - start, end - first, tokens, text)


@contextlib.contextmanager
def _server(args: argparse.Namespace) -> Iterator[int]:
    """The port of `serve` with the pair that the flags name, in a process of its own."""
    flags = [*SERVE_FLAGS, "--num-draft-tokens", str(args.num_draft_tokens)]
    for name in ("model", "draft", "gguf", "adapter_path", "dtype"):
        if (value := getattr(args, name)) is not None:
            flags += [f"--{name.replace('_', '-')}", value]
    flags += ["--trust-remote-code"] * args.trust_remote_code
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_redrafter.cli.main", "serve", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield _port(process)
    finally:
        process.terminate()
        process.wait()


def _port(process: subprocess.Popen[str]) -> int:
    """Where it listens, which it says when its models are loaded. Raises UserError with its last line instead."""
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        if line.startswith("Serving "):
            threading.Thread(target=process.stdout.read, daemon=True).start()  # or its log would fill the pipe
            return int(line.rsplit(":", 1)[1])
        last = line.strip() or last
    raise UserError(f"the server did not start: {last.removeprefix('mlx-redrafter: error: ')}")
