"""What every process of a test with several does: it writes texts of a small model that is split, and notes them.

Run as a program by `launched`; the same function writes the texts of one process.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import mlx_redrafter  # isort: skip # noqa: F401 (before mlx)

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_redrafter.benchmarks.architectures import small_models
from mlx_redrafter.benchmarks.architectures.check import PROMPT

from mlx_redrafter import DraftShape, batch_generate, stream_generate
from mlx_redrafter.constraints.constraint import regex
from mlx_redrafter.decoding.sampling import greedy, position_keyed
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.loading import EMBEDDED
from mlx_redrafter.tuning import measure, session
from support.costs import made_up

from mlx_lm.utils import load_tokenizer  # isort: skip


def ours(said: str) -> list[str]:
    """Lines that processes of ours have said; MLX's ring says its own in pieces, in front of ours and behind them."""
    left = re.sub(r"\[ring\].*?(?=mlx-redrafter|$)", "", said, flags=re.M)
    return [line.strip() for line in left.splitlines() if re.search("[a-zA-Z]", line)]


def every_third(tokens: mx.array, logits: mx.array) -> mx.array:
    """A logits processor that allows some tokens, by the one before."""
    return mx.where((mx.arange(logits.shape[-1]) + tokens[-1]) % 3 == 0, logits, -mx.inf)


CHOOSERS = {"greedy": greedy, "seeded": position_keyed(1.0, seed=7)}
WAYS = {
    "plain": {},
    "chain": {"shape": DraftShape(), "lookup": "off"},
    "tree": {"shape": DraftShape(2, 5, 6), "lookup": "off"},
    "auto": {},
    "lookup": {"lookup": "auto"},
    "structured": {"constraint": regex(r"(import [a-z_]{2,12}\n){40}")},
    "processor": {"logits_processors": [every_third]},
    "measured": {},  # auto by what steps cost, which the processes measure together
}
WIDTHS = {  # that two and three processes can divide
    "hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 8, "moe_intermediate_size": 24,
    "vocab_size": 4096,  # the tokenizer's
}  # fmt: skip


def texts_of(name: str, count: int, ways: list[str], split: str | None = None) -> dict[str, list[int]]:
    """Tokens of a small random model's texts by how they were chosen and drafted; the drafter knows the greedy one.

    Args:
        name: of a module of mlx_lm.models.
        count: tokens of each text.
        ways: some of WAYS, "turns" for a text that is gone on with, and "batch" for three at once.
        split: how the model is split over the processes; None for one process.
    """
    tokenizer = load_tokenizer(EMBEDDED / "target")
    grammars, tokenizer.eos_token_ids = load_tokenizer(EMBEDDED / "target"), []
    with pytest.MonkeyPatch.context() as patch:
        for key, value in WIDTHS.items():
            patch.setitem(small_models.CONFIGS["common"], key, value)
        model = small_models.build(name)

    asked = list(PROMPT)

    def write(drafter: Any, **options: Any) -> list[int]:
        words = grammars if "constraint" in options else tokenizer
        return [r.token for r in stream_generate(model, words, asked, drafter, max_tokens=count, **options)]

    known = write(None, **WAYS["plain"])
    if split == "tensor":
        model.shard(mx.distributed.init())
    elif split is not None:
        model.model.pipeline(mx.distributed.init())
    drafter = small_models.PerfectDrafter(Target.of(model), PROMPT, known)
    if split is not None and mx.distributed.init().rank():
        asked[1:3] = [5]  # as though its template had put in another date
    found = {}
    for chosen, chooser in CHOOSERS.items():
        for way in ways:
            if way == "turns":
                cache = make_prompt_cache(model)
                parts = [write(drafter, chooser=chooser, prompt_cache=cache) for _ in range(2)]
                found[f"{chosen} {way}"] = parts[0] + parts[1]
            elif way == "batch":
                prompts = [asked[: 4 + 3 * i] for i in range(3)]
                done = batch_generate(
                    model, tokenizer, prompts, max_tokens=count, return_token_ids=True, drafter=drafter, chooser=chooser
                )
                found[f"{chosen} {way}"] = list(itertools.chain(*(done.token_ids or [])))
            else:
                found[f"{chosen} {way}"] = write(
                    None if way in ("plain", "lookup") else drafter, chooser=chooser, **WAYS[way]
                )
    return found


def launched(folder: pathlib.Path, size: int, split: str, names: list[str], count: int, ways: list[str]) -> Any:
    """The same texts of so many processes on this machine: of each of them, by the model's name."""
    words = [str(folder), split, ",".join(names), str(count), *ways]
    done = together(size, [sys.executable, __file__, *words])
    files = sorted(folder.glob("rank-*.json"))
    assert len(files) == size and not done.returncode, done.stdout + done.stderr
    return [json.loads(file.read_text()) for file in files]


def together(size: int, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command in so many processes, as mlx.launch does it."""
    with launching(size, command) as process:
        out, err = process.communicate(timeout=1500)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextlib.contextmanager
def launching(size: int, command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """mlx.launch with a command, in a group of processes of its own, of which nothing is left in the end."""
    launcher = pathlib.Path(sys.executable).parent / "mlx.launch"
    typed, keyboard = os.pipe()  # nobody types; at the end of its input mlx.launch would keep a core busy
    try:
        process = subprocess.Popen(
            [str(launcher), *ring(size), "--", *command],
            stdin=typed,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    finally:
        os.close(typed)
        os.close(keyboard)


def started(folder: pathlib.Path, words: list[list[str]]) -> list[subprocess.Popen[str]]:
    """A process of `mlx-redrafter` for each list of words, without mlx.launch, which ends all when one has ended."""
    start = int(ring(len(words))[-1])
    (folder / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{start + rank}"] for rank in range(len(words))]))
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "MLX_HOSTFILE": str(folder / "hosts.json")}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "mlx_redrafter.cli.main", *own],
            env=environment | {"MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(words)
    ]


def ring(size: int) -> list[str]:
    """Flags of mlx.launch for so many processes on this machine, on ports that nobody has."""
    with contextlib.ExitStack() as stack:
        while True:
            start = random.randrange(20000, 60000)
            with contextlib.suppress(OSError):
                for port in range(start, start + size):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
                return ["-n", str(size), "--backend", "ring", "--starting-port", str(start)]


def main() -> None:
    folder, split, names, count, *ways = sys.argv[1:]
    # Costs that are each process's own, so that each would choose for itself; drafts pay for some, not for others.
    rank = mx.distributed.init().rank()
    if ways == ["measured"]:
        measure.SECONDS = 0.0
    else:
        session.measure = lambda *_: made_up(lambda rows: 1.0 if rows <= 8 - 3 * rank else 9.0, plain=9.0 - 8.5 * rank)
    found = {}
    for name in names.split(","):
        found[name] = texts_of(name, int(count), ways, split)
        print(rank, name, "done", flush=True)
        (pathlib.Path(folder) / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
