"""Methods of decoding, timed in turn on the same prompts, so that all see the same machine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from tqdm import tqdm

Method = Callable[[str], Iterable]  # a prompt in, a stream of responses out (mlx-lm's or ours)


@dataclasses.dataclass
class Run:
    """One text: its tokens, seconds from the first token to the last, and steps after the first token."""

    tokens: list[int]
    seconds: float
    steps: int


def side_by_side(methods: Mapping[str, Method], prompts: Sequence[str]) -> dict[str, list[Run]]:
    """Runs every method on every prompt, method after method for each prompt."""
    runs: dict[str, list[Run]] = {name: [] for name in methods}
    for prompt in tqdm(prompts, desc="measuring", unit="text", leave=False):
        for name, method in methods.items():
            runs[name].append(measure(method(prompt)))
    return runs


def measure(stream: Iterable, show: bool = False) -> Run:
    """Takes a stream of responses to its end."""
    tokens, first, response = [], 0.0, None
    for response in stream:
        tokens.append(response.token)
        if len(tokens) == 1:
            first = time.perf_counter()
        if show:
            print(response.text, end="", flush=True)
    seconds = time.perf_counter() - first
    return Run(tokens, seconds, getattr(response, "steps", len(tokens) - 1))


def table(runs: dict[str, list[Run]]) -> str:
    """The comparison; speed-up is relative to the first method."""
    totals = {
        name: (sum(len(r.tokens) - 1 for r in each), sum(r.seconds for r in each), sum(r.steps for r in each))
        for name, each in runs.items()
    }
    base = next(iter(totals.values()))
    lines = [f"{'':20}{'tokens/s':>10}{'mean acceptance length':>26}{'speed-up':>10}"]
    for name, (tokens, seconds, steps) in totals.items():
        speed_up = (tokens / seconds) / (base[0] / base[1])
        lines.append(f"{name:20}{tokens / seconds:10.1f}{tokens / steps:26.2f}{speed_up:9.2f}x")
    reference, *others = runs.values()
    same = sum(a.tokens == b.tokens for other in others for a, b in zip(reference, other))
    lines.append(f"Texts equal to the plain one, token for token: {same} of {len(reference) * len(others)}")
    return "\n".join(lines)
