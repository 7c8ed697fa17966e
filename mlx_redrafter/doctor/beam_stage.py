"""Beam search in two places: the same beams, or others that are as good.

Knows nothing of how the places are chosen.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_redrafter.doctor.comparison import Outputs, Stage
from mlx_redrafter.drafting.beam_search import beam_search
from mlx_redrafter.drafting.drafter_files import Embedder
from mlx_redrafter.drafting.redrafter import RecurrentDrafter

WIDTH, LENGTH = 4, 5
PARTS = ("tokens", "origins", "log_probs")


def beam_stage(drafter: RecurrentDrafter, embed: Embedder, contexts: mx.array, roots: mx.array) -> Stage:
    """Beam search behind several contexts, (n, hidden_size), and roots, (n,) int32, one after the other."""

    def run() -> dict[str, mx.array]:
        width = min(WIDTH, drafter.config.scored)
        cases = [(contexts[i : i + 1], roots[i : i + 1]) for i in range(roots.shape[0])]
        beams = [
            beam_search(drafter, embed, drafter.project_context(context), root, width, LENGTH)
            for context, root in cases
        ]
        return {name: mx.concatenate([getattr(beam, name) for beam in beams]) for name in PARTS}

    def judge(found: Outputs, expected: Outputs, tolerance: float) -> str:
        return judge_beams(found, expected, _scores(drafter, embed, contexts, roots, found), tolerance)

    return Stage("beam search", run, judge)


def judge_beams(found: Outputs, expected: Outputs, scores: np.ndarray | None, tolerance: float) -> str:
    """What is wrong with beams, if anything.

    Two continuations that are equally probable but for rounding may change places, and
    others then grow from them. So beams need not be equal: up to the first difference, and
    there, they have to be as probable as the expected ones, and all must be as probable as
    they say.

    Args:
        found, expected: tokens, origins and log_probs, (n, L - 1, W) each.
        scores: (n, L - 1, W) log-probabilities of what was found, computed anew; None if it is no beam.
        tolerance: relative to the largest log-probability.
    """
    if scores is None:
        return "origins or tokens are out of range"
    most = tolerance * max(1.0, float(np.abs(expected["log_probs"]).max()))

    def far(mine: np.ndarray, theirs: np.ndarray) -> bool:
        return not bool((np.abs(mine - theirs) <= most).all())

    if far(found["log_probs"], scores):
        apart = np.abs(found["log_probs"] - scores).max()
        return f"log-probabilities are not those of the tokens (apart by {apart:.2g}, expected {most:.2g} at most)"
    for case in range(scores.shape[0]):
        for step in range(scores.shape[1]):
            if far(found["log_probs"][case, step], expected["log_probs"][case, step]):
                return f"beams of step {step + 1} are not the most probable ones"
            if any((found[part][case, step] != expected[part][case, step]).any() for part in ("tokens", "origins")):
                break  # a tie; what grows from here may be other beams
    return ""


def _scores(
    drafter: RecurrentDrafter, embed: Embedder, contexts: mx.array, roots: mx.array, found: Outputs
) -> np.ndarray | None:
    """The drafter's log-probability of every entry of some beams, step by step along its own path."""
    tokens, origins = found["tokens"], found["origins"]
    cases, steps, width = tokens.shape
    drafted = np.array(drafter.get("vocab_map", mx.arange(drafter.config.scored)))
    place = {int(token): i for i, token in enumerate(drafted)}
    first = origins[:, 0].any()  # there is only the root to grow from
    if first or origins.min() < 0 or origins.max() >= width or not {*map(int, tokens.reshape(-1))} <= place.keys():
        return None
    scores = np.zeros(tokens.shape, np.float32)
    for case in range(cases):
        projected = drafter.project_context(contexts[case : case + 1])
        state = drafter.advance(embed(roots[case : case + 1]), None)
        above = np.zeros(1, np.float32)
        for step in range(steps):
            logits = drafter.logits(projected, state).astype(mx.float32)
            log_probs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            came_from = origins[case, step]
            columns = [place[int(token)] for token in tokens[case, step]]
            above = above[came_from] + log_probs[came_from, columns]
            scores[case, step] = above
            grown = embed(mx.array(tokens[case, step]))
            state = drafter.advance(grown, state[mx.array(came_from)])
    return scores
