"""Ends a model's thoughts after so many tokens, as a logits processor. Knows nothing of grammars and tokenizers.

Nothing is read on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx


def thinking_budget(start: Sequence[int], end: Sequence[int], most: int) -> Callable[[mx.array, mx.array], mx.array]:
    """A processor that forces the end of a thought when it has so many tokens.

    Args:
        start, end: the tokens that begin and end a thought, at least one each.
        most: tokens of a thought, what begins and ends it not counted.
    """
    window, ends = len(start) + most + len(end), mx.array([*end])

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        recent = tokens[-window:]
        begun, ended = _behind_last(recent, start), _behind_last(recent, end)
        spent = recent.shape[0] - begun
        due = (begun > ended) & (spent >= most)
        token = ends[mx.clip(spent - most, 0, len(end) - 1)]
        return mx.where(due & (mx.arange(logits.shape[-1]) != token), mx.array(-mx.inf, logits.dtype), logits)

    return process


def _behind_last(tokens: mx.array, sought: Sequence[int]) -> mx.array:
    """The place behind the last occurrence; 0 where there is none."""
    places = tokens.shape[0] - len(sought) + 1
    if places < 1:
        return mx.array(0)
    found = mx.ones(places, mx.bool_)
    for i, token in enumerate(sought):
        found = found & (tokens[i : i + places] == token)
    return mx.where(found, mx.arange(places) + len(sought), 0).max()
