"""mlx-lm's logits processors on every row of a tree, each with the tokens on the path to it.

A processor takes the tokens so far, (n,), and logits, (1, vocab), and returns logits. How
many tokens lie on a path is known only once the tree has been drafted, so the host has to
read the tree in the middle of a step, and the next step can be built only when this one
has been read: processors cost the pipelining.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_redrafter.target.tree import CandidateTree

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


def process(processors: Sequence[LogitsProcessor], tokens: mx.array, logits: mx.array) -> mx.array:
    """Applies processors in order.

    Args:
        tokens: (n,) everything before the token to be chosen, the prompt included.
        logits: (1, vocab).
    """
    for processor in processors:
        logits = processor(tokens, logits)
    return logits


def process_tree(
    processors: Sequence[LogitsProcessor], history: mx.array, tree: CandidateTree, logits: mx.array
) -> mx.array:
    """Applies processors to every row with exactly the tokens on the path to that row.

    Args:
        history: (n,) all tokens before the root.
        tree: of batch size 1; the host waits for its parents.
        logits: (1, 1 + N, vocab).

    Returns:
        (1, 1 + N, vocab).
    """
    parents: Any = tree.parents[0].tolist()
    rows = []
    for row in range(tree.rows):
        path = [row]
        while path[0]:
            path.insert(0, parents[path[0]])
        tokens = mx.concatenate([history, tree.tokens[0, mx.array(path)]])
        rows.append(process(processors, tokens, logits[:, row]))
    return mx.stack(rows, axis=1)
