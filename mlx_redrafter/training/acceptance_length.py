"""Measures the mean acceptance length of a drafter by real decoding of held-out text.

Knows nothing of training.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_redrafter.decoding.loop import speculative
from mlx_redrafter.decoding.planner import Planner, StepRead
from mlx_redrafter.decoding.sampling import draft_temperature, greedy
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.kinds import Drafter, proposer_for
from mlx_redrafter.drafting.shape import Drafted, DraftShape, Plan
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.training.text.shards import Rows
from mlx_redrafter.tuning.acceptance_model import AcceptanceModel


def acceptance_length(
    target: Target, drafter: Drafter, prompts: list[list[int]], shape: DraftShape, max_tokens: int
) -> float:
    """Mean acceptance length of greedy decoding: tokens per step of the target, `max_tokens` for each prompt.

    The drafter's config gets the shares of right drafts by depth.
    """
    verifier, steps, planner = verifier_of(target.model).checked(), 0, _Learning(Drafted(shape))
    proposer = proposer_for(drafter, target.embed, draft_temperature(greedy))
    for prompt in prompts:
        options = DecodingOptions(greedy, max_tokens)
        produced = list(speculative(verifier, proposer, mx.array([prompt]), verifier.make_cache(), options, planner))
        steps += len(produced) - 1  # the first token is the prompt's
    drafter.config.right_by_depth = planner.acceptance.known()
    return len(prompts) * (max_tokens - 1) / max(1, steps)


class _Learning(Planner):
    """Drafts the same in every step, and learns how often that was right."""

    def __init__(self, always: Plan):
        super().__init__(always)
        self.acceptance = AcceptanceModel()

    def learn(self, step: StepRead) -> None:
        self.acceptance.learn(step)


def held_out_prompts(rows: Rows, prefix_length: int) -> list[list[int]]:
    """Beginnings of the held-out rows: what is not learned, and a few tokens at least.

    The few are `prefix_length`, at most a quarter of a row.
    """
    tokens, counts = rows[len(rows) - rows.held_out :]
    ends = np.maximum(counts.argmax(axis=1) + 1, min(prefix_length, rows.length // 4))
    return [row[:end].tolist() for row, end in zip(tokens, ends, strict=True)]
