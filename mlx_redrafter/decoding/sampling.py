"""The target's own choice of a token at every row of a tree.

Drafts never enter here. Speculative and plain decoding ask the same function, which is
what makes their texts equal: greedily, or with noise that depends only on a seed and on
the position of the token being chosen.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, apply_xtc

from mlx_redrafter.errors import UserError

# Takes logits (B, M, vocab) and the positions (B, M) int32 that the chosen tokens will
# have in the sequence; returns token ids (B, M) int32.
Chooser = Callable[[mx.array, mx.array], mx.array]


def greedy(logits: mx.array, positions: mx.array) -> mx.array:
    """The most probable token."""
    return mx.argmax(logits, axis=-1).astype(mx.int32)


@dataclasses.dataclass(frozen=True)
class PositionKeyed:
    """Sampling whose noise at position p is a function of (seed, p) alone.

    A token is drawn as argmax(log p / temp + g) with Gumbel noise g, which is a draw from
    softmax(log p / temp). Filters are mlx-lm's, in its order, before the temperature.

    Args:
        temp: temperature, above 0 (see `position_keyed`).
        seed: any whole number; its lowest 32 bits count.
        top_p: keep the most probable tokens that together reach this share; 1 (and 0, as in mlx-lm) keeps all.
        min_p: keep tokens of at least this share of the best one's probability; 0 keeps all.
        top_k: keep this many; 0 keeps all.
        min_tokens_to_keep: that min_p leaves at least.
        xtc_probability: how often, position by position, XTC drops all but the least
            probable of the tokens above its threshold.
        xtc_threshold: that probability, 0 to 0.5.
        xtc_special_tokens: ids that XTC never drops.

    Raises:
        UserError: a value out of range.
    """

    temp: float
    seed: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    min_tokens_to_keep: int = 1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    xtc_special_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        for field, least, most in (
            ("temp", 0, sys.float_info.max),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("top_k", 0, sys.maxsize),
            ("min_tokens_to_keep", 1, sys.maxsize),
            ("xtc_probability", 0, 1),
            ("xtc_threshold", 0, 0.5),
        ):
            if not least <= (value := getattr(self, field)) <= most:
                expected = f"{least} {f'to {most}' if most <= 1 else 'or more'}"
                raise UserError(f"--{field.replace('_', '-')} is {value}, expected {expected}")

    def __call__(self, logits: mx.array, positions: mx.array) -> mx.array:
        return self.draw([self.seed] * logits.shape[0], logits, positions)

    def draw(self, seeds: Sequence[int], logits: mx.array, positions: mx.array) -> mx.array:
        """The same with a seed for each entry of the batch."""
        batch, rows, vocab = logits.shape
        logprobs = logits.astype(mx.float32).reshape(-1, vocab)  # up to a number per row
        if 0 < self.top_p < 1:  # everything else goes by differences alone
            logprobs = logprobs - mx.logsumexp(logprobs, axis=-1, keepdims=True)
            logprobs = apply_top_p(logprobs, self.top_p)
        if self.min_p > 0:
            logprobs = apply_min_p(logprobs, self.min_p, min(self.min_tokens_to_keep, vocab))
        if self.xtc_probability > 0:
            # Probability 1 always applies; whether it does is drawn here, per position.
            dropped = apply_xtc(logprobs, 1.0, self.xtc_threshold, list(self.xtc_special_tokens))
            drawn = _noise(mx.random.uniform, [seed ^ _XTC for seed in seeds], positions, 1) <= self.xtc_probability
            logprobs = mx.where(drawn, dropped, logprobs)
        if 0 < self.top_k < vocab:
            logprobs = apply_top_k(logprobs, self.top_k)
        noise = _noise(mx.random.gumbel, seeds, positions, vocab)
        return mx.argmax(logprobs / self.temp + noise, axis=-1).reshape(batch, rows).astype(mx.int32)


def position_keyed(temp: float, *others: Any, **named: Any) -> Chooser:
    """The chooser of a temperature, 0 for greedy; all arguments are those of `PositionKeyed`."""
    chooser = PositionKeyed(temp, *others, **named)
    return greedy if temp == 0 else chooser


def choose_each(choosers: Sequence[Chooser], logits: mx.array, positions: mx.array) -> mx.array:
    """What each text's own chooser makes of its rows; those that differ in their seeds alone choose together.

    Args:
        choosers: B of them.
        logits, positions: as for a chooser.
    """
    groups: list[tuple[Chooser, list[int]]] = []
    for text, chooser in enumerate(choosers):
        kind = dataclasses.replace(chooser, seed=0) if isinstance(chooser, PositionKeyed) else chooser
        for known, texts in groups:
            if known == kind:
                texts.append(text)
                break
        else:
            groups.append((kind, [text]))
    found, order = [], list[int]()
    for kind, texts in groups:
        rows = logits, positions
        if len(groups) > 1:
            rows = logits[mx.array(texts)], positions[mx.array(texts)]
        seeds = [c.seed for text in texts if isinstance(c := choosers[text], PositionKeyed)]
        found.append(kind.draw(seeds, *rows) if isinstance(kind, PositionKeyed) else kind(*rows))
        order += texts
    if len(groups) == 1:
        return found[0]
    places = sorted(range(len(order)), key=order.__getitem__)
    return mx.concatenate(found)[mx.array(places)]


_XTC = 0x9E3779B9  # keeps XTC's draws apart from the tokens'


def _noise(draw: Callable[..., mx.array], seeds: Sequence[int], positions: mx.array, count: int) -> mx.array:
    """(B * M, count) random values, the same for the same (seed, position); positions (B, M)."""
    words = mx.array([[seed & 0xFFFFFFFF] for seed in seeds], mx.uint32)
    keys = mx.stack([mx.broadcast_to(words, positions.shape), positions.astype(mx.uint32)], axis=-1).reshape(-1, 2)
    return mx.vmap(lambda key: draw(shape=(count,), key=key))(keys)


def from_sampler(sampler: Callable[[mx.array], mx.array]) -> Chooser:
    """Uses an mlx-lm sampler (log-probabilities (rows, vocab) in, tokens (rows,) out).

    Every row draws for itself, so the text has the sampler's distribution, but the same
    seed does not give the same text with and without drafts.
    """

    def choose(logits: mx.array, positions: mx.array) -> mx.array:
        batch, rows, vocab = logits.shape
        flat = logits.reshape(-1, vocab)
        logprobs = flat - mx.logsumexp(flat, axis=-1, keepdims=True)
        return sampler(logprobs).reshape(batch, rows).astype(mx.int32)

    return choose


_UNKNOWN = 0.7  # temperature that fits a drafter's distribution to what a greedy target chooses


def draft_temperature(choose: Chooser) -> float:
    """The temperature at which a drafter's probabilities are those of the target's choices.

    A drafter learns the target's distribution, but only a target at temperature 1 draws from
    that; a greedy one takes the most probable token far more often. What is left is what the
    drafter does not know, a noise of its own, to which that of the sampling adds as
    independent noises do: sqrt(0.7^2 + temp^2). On texts of the embedded pair the likeliest
    temperatures are 0.67, 0.80 and 0.93 for targets at 0, 0.5 and 0.7.

    It matters for trees, whose nodes are ranked by these probabilities; never for the text.

    Args:
        choose: how the target chooses. Of a function that is not ours nothing is known, and
            the drafter's probabilities stay as they are.
    """
    if isinstance(choose, PositionKeyed):
        return math.hypot(_UNKNOWN, choose.temp)
    return _UNKNOWN if choose is greedy else 1.0
