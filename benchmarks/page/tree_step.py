"""Finds a step of decoding for the page's picture: the tree, its probabilities, and the accepted path.

Knows nothing of HTML.
"""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from mlx_redrafter.decoding.planner import Planner
from mlx_redrafter.decoding.sampling import draft_temperature, greedy
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.decoding.trace import WatchedStep, watch
from mlx_redrafter.decoding.tree_view import token_text
from mlx_redrafter.drafting.kinds import Drafter, proposer_for
from mlx_redrafter.drafting.shape import Drafted, DraftShape
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import TREE

SHAPE = DraftShape(4, 5, 12)
TOKENS = 48  # of each text that is looked at


def picture_of(model: nn.Module, drafter: Drafter, tokenizer: Any, texts: list[list[int]]) -> dict[str, Any] | None:
    """Of a few greedy texts the step with the most to see; None for a target that verifies no trees.

    That is one that accepted much beside candidates that were rejected.

    Returns:
        `before`, the end of the text so far, up to and without the root; `nodes`, the root first, parents before
        children; `own`, the target's own token after the accepted path; `shape`, what was drafted, in words.
    """
    verifier = verifier_of(model)
    if verifier.capability != TREE:
        return None
    best: tuple[float, list[int], WatchedStep] | None = None
    for ids in texts:
        written = list(ids)
        proposer = proposer_for(drafter, verifier.target.embed, draft_temperature(greedy))
        planner, options = Planner(Drafted(SHAPE)), DecodingOptions(greedy, TOKENS)
        for step, tokens in watch(verifier, proposer, ids, options, planner, drafter, tokenizer.eos_token_ids):
            if step is not None and (best is None or _interest(step) > best[0]):
                best = _interest(step), written[:-1], step
            written += tokens
    if best is None:
        return None
    _, before, step = best
    accepted = sum(node.accepted for node in step.nodes) - 1
    nodes = [
        {"id": f"tree/{i}", "text": token_text(tokenizer, n.token), "parent": n.parent, "depth": n.depth}
        | {"accepted": n.accepted, "probability": n.probability}
        for i, n in enumerate(step.nodes)
    ]
    own = "".join(token_text(tokenizer, token) for token in step.tokens[accepted : accepted + 1])
    return {"before": tokenizer.decode(before[-40:]), "nodes": nodes, "own": own, "shape": str(SHAPE)}


def _interest(step: WatchedStep) -> float:
    """Accepted candidates count most, then how many were rejected as siblings of accepted ones."""
    accepted = [i for i, node in enumerate(step.nodes) if node.accepted]
    beside = sum(not node.accepted and node.parent in accepted for node in step.nodes)
    return 2 * min(len(accepted), 4) + beside - 0.5 * max(0, beside - 5)
