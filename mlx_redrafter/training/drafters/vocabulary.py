"""Chooses the tokens of a reduced draft vocabulary, and measures how much of a text it covers.

Knows nothing of weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_redrafter.training.text.shards import Rows

_BLOCK = 1024  # rows at a time


def frequent_tokens(rows: Rows, size: int, vocab_size: int) -> np.ndarray:
    """The ids of the `size` tokens that are learned most often, (size,) int32 rising; held-out rows do not count."""
    # Of equally frequent ones those of lower id, which most tokenisers made first.
    return np.sort(np.argsort(-token_counts(rows, vocab_size), kind="stable")[:size]).astype(np.int32)


def token_counts(rows: Rows, vocab_size: int) -> np.ndarray:
    """How often each token is learned, (vocab_size,). Raises ValueError for tokens beyond the vocabulary."""
    seen = np.zeros(vocab_size, np.int64)
    for first in range(0, len(rows) - rows.held_out, _BLOCK):
        tokens, counts = rows[first : min(first + _BLOCK, len(rows) - rows.held_out)]
        seen += np.bincount(tokens[counts], minlength=vocab_size)
    return seen


def vocab_map_of(drafter: Any) -> np.ndarray | None:
    """The target's ids of what a drafter can draft; None where it is all tokens."""
    return np.array(drafter.vocab_map) if "vocab_map" in drafter else None


def coverage(rows: Rows, vocab_map: np.ndarray | None) -> float:
    """The share of held-out tokens that can be drafted."""
    if vocab_map is None:
        return 1.0
    tokens, counts = rows[len(rows) - rows.held_out :]
    learned = tokens[counts]
    return float(np.isin(learned, vocab_map).mean()) if learned.size else 1.0
