"""The figures of the README that `mlx-redrafter demo` does not print.

python -m mlx_redrafter.benchmarks.figures

Mean acceptance length of the embedded drafter by tree policy, and the time of reading a
long prompt beside mlx_lm's.
"""

from __future__ import annotations

import statistics
import time

import mlx_redrafter  # isort: skip  (before mlx: it puts OpenBLAS in front of MLX's BLAS)

import mlx_lm

from ..beam_search import POLICIES
from ..embedded.corpus import held_out_prefixes, stdlib_files
from ..settings import DraftShape
from ..target import Target
from ..training.trainer import acceptance_length

PROMPT_TOKENS, REPEATS = 2000, 9


def main() -> None:
    model, drafter, tokenizer = mlx_redrafter.load()
    assert drafter is not None
    prompts = [tokenizer.encode(prefix) for prefix in held_out_prefixes(30)]
    for policy in POLICIES:
        length = acceptance_length(Target(model), drafter, prompts, DraftShape(4, 5, 12, policy), 128)
        print(f"{policy}: mean acceptance length {length:.2f} (W = 4, L = 5, N = 12, {len(prompts)} prefixes x 128)")
    text = "".join(text for _, text, held_out, _ in stdlib_files() if held_out)
    prompt = tokenizer.encode(text[: 10 * PROMPT_TOKENS])[:PROMPT_TOKENS]
    ratios = []
    for _ in range(REPEATS):
        theirs = seconds(lambda: next(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=2)))
        ours = seconds(lambda: next(mlx_redrafter.stream_generate(model, tokenizer, prompt, drafter, max_tokens=2)))
        ratios.append(ours / theirs)
    print(
        f"first token after {len(prompt)} tokens: {statistics.median(ratios):.3f} times mlx_lm's (median of {REPEATS})"
    )


def seconds(action) -> float:
    tic = time.perf_counter()
    action()
    return time.perf_counter() - tic


if __name__ == "__main__":
    main()
