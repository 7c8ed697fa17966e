"""The step, and the two loops built on it: speculative and autoregressive decoding.

A loop submits step t + 1 before it reads the tokens of step t: cache length, context and
root stay on the device, so building one graph hides behind the run of the one before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from typing import Any

import mlx.core as mx

from .acceptance import accept
from .beam_search import BEST_FIRST, POLICIES, beam_search, candidate_tree
from .drafter import RecurrentDrafter
from .errors import UserError
from .kv_cache import KVCache
from .sampling import Chooser
from .target import Target
from .verification import CHAIN, Verifier

Progress = Callable[[int, int], None]  # prompt tokens read so far, and in all


@dataclasses.dataclass(frozen=True)
class DraftShape:
    """How much is drafted per step.

    Args:
        beam_width: W beams.
        beam_length: L tokens per beam, the root included.
        num_draft_tokens: N nodes that the target checks per step, the root not counted.
        tree_policy: which nodes: "best-first" or "beams".
    """

    beam_width: int = 4
    beam_length: int = 5
    num_draft_tokens: int = 7
    tree_policy: str = BEST_FIRST

    def check(self, vocab_size: int) -> None:
        """Raises UserError for a value out of range, naming its flag."""
        if not 1 <= self.beam_width <= min(64, vocab_size):
            raise UserError(f"--beam-width is {self.beam_width}, expected 1 to {min(64, vocab_size)}")
        if not 2 <= self.beam_length <= 32:
            raise UserError(f"--beam-length is {self.beam_length}, expected 2 to 32 (the root counts as one)")
        most = self.beam_width * (self.beam_length - 1)
        if not 1 <= self.num_draft_tokens <= most:
            raise UserError(
                f"--num-draft-tokens is {self.num_draft_tokens}, expected 1 to {most}"
                f" = beam width {self.beam_width} x (beam length {self.beam_length} - 1)"
            )
        if self.tree_policy not in POLICIES:
            raise UserError(f"--tree-policy is {self.tree_policy!r}, expected one of {', '.join(POLICIES)}")


def check_pair(target: Target, drafter: RecurrentDrafter, name: str = "drafter") -> None:
    """Raises UserError unless the drafter was made for a target of this shape."""
    for field in ("hidden_size", "vocab_size"):
        found, expected = getattr(drafter.config, field), getattr(target, field)
        if found != expected:
            raise UserError(
                f"{name}: {field} is {found}, but the target's is {expected}; it was made for another model"
            )


@dataclasses.dataclass
class Produced:
    """What one step brought.

    Attributes:
        tokens: the new tokens, at least one.
        logits: (len(tokens) or more, vocab_size) the target's, row i for tokens[i]; lazy.
        drafted: whether tokens[i] had been drafted; all but the last of a speculative step.
        from_prompt: True for the token that follows the prompt, which no step made.
        last: False for a part of a step's tokens that more of them follow.
    """

    tokens: list[int]
    logits: mx.array
    drafted: list[bool]
    from_prompt: bool = False
    last: bool = True


@dataclasses.dataclass
class _Submitted:
    """A step's results while the device is still at it."""

    count: mx.array
    tokens: mx.array
    logits: mx.array


def prefill(
    target: Target, prompt: mx.array, cache: list[Any], step_size: int, progress: Progress | None = None
) -> tuple[mx.array | None, mx.array]:
    """Reads a prompt in chunks, as mlx-lm does.

    Args:
        target: the model.
        prompt: (B, P) token ids, P at least 1.
        cache: one mlx-lm cache per layer; may already hold the tokens before the prompt.
        step_size: tokens per chunk.
        progress: called with the tokens read so far and in all.

    Returns:
        hidden (B, hidden_size), where the target gives one, and logits (B, vocab_size) of
        the last prompt token; lazy.
    """
    total = prompt.shape[1]
    read = 0
    while total - read > 1:
        if progress is not None:
            progress(read, total)
        chunk = prompt[:, read : min(read + step_size, total - 1)]
        target.forward(chunk, cache)  # no logits are computed: nothing reads them
        mx.eval([c.state for c in cache])
        mx.clear_cache()
        read += chunk.shape[1]
    hidden, logits = target.forward(prompt[:, read:], cache)
    if progress is not None:
        mx.eval(logits)
        progress(total, total)
    return None if hidden is None else hidden[:, -1], logits[:, -1]


class SpeculativeStep:
    """One round of drafting, verification, acceptance and commit, as one lazy graph.

    Calling it builds the graph for the next step from the state the last one left and
    returns its results unevaluated. Nothing is read by the host.

    Attributes:
        context: (B, hidden_size) the target's hidden state at the last committed token.
        root: (B,) int32 the token the target has chosen and not yet read.
    """

    def __init__(
        self,
        verifier: Verifier,
        drafter: RecurrentDrafter,
        shape: DraftShape,
        choose: Chooser,
        cache: KVCache,
        context: mx.array,
        root: mx.array,
    ):
        self.verifier, self.drafter, self.shape, self.choose, self.cache = verifier, drafter, shape, choose, cache
        self.context, self.root = context, root

    @property
    def most(self) -> int:
        """The largest number of draft tokens that one step can accept."""
        return min(self.shape.beam_length - 1, self.shape.num_draft_tokens)

    def __call__(self) -> _Submitted:
        shape, cache = self.shape, self.cache
        assert cache.length is not None
        beam = beam_search(
            self.drafter, self.verifier.target.embed, self.context, self.root, shape.beam_width, shape.beam_length
        )
        tree = candidate_tree(beam, self.root, shape.num_draft_tokens, shape.tree_policy)
        hidden, logits = self.verifier(tree, cache)
        choices = self.choose(logits, cache.length[:, None] + tree.depths + 1)
        accepted = accept(tree, choices)
        # With one beam the rows already lie in order.
        cache.commit(None if shape.beam_width == 1 else accepted.path[:, 1:], accepted.count, self.most)
        self.root = accepted.root
        self.context = mx.take_along_axis(hidden, accepted.last[:, None, None], axis=1)[:, 0]
        path_logits = mx.take_along_axis(logits, accepted.path[..., None], axis=1)
        return _Submitted(accepted.count, accepted.tokens, path_logits)

    def results(self, submitted: _Submitted) -> list[mx.array]:
        """Everything of a step that has to be computed, to submit it to the device."""
        return [submitted.count, submitted.tokens, self.root, self.context, *self.cache.arrays()]


def speculative(
    verifier: Verifier,
    drafter: RecurrentDrafter,
    prompt: mx.array,
    cache: KVCache,
    choose: Chooser,
    shape: DraftShape,
    max_tokens: int,
    prefill_step_size: int = 2048,
    progress: Progress | None = None,
) -> Generator[Produced]:
    """Decodes with drafts (batch size 1).

    Args:
        verifier: with a capability other than "none".
        prompt: (1, P) token ids that the cache does not hold yet.
        cache: grows; `KVCache.end_trees` has to be called when the loop is left, early or not.
        choose: how the target chooses.
        max_tokens: stop after this many; -1 for no limit.

    Yields:
        What each step brought. The last one may exceed `max_tokens`.
    """
    if verifier.capability == CHAIN and shape.beam_width > 1:
        length = min(shape.beam_length, shape.num_draft_tokens + 1)
        shape = DraftShape(1, length, length - 1, shape.tree_policy)
    hidden, logits = prefill(verifier.target, prompt, cache.layers, prefill_step_size, progress)
    cache.begin_trees()
    assert cache.length is not None and hidden is not None
    root = choose(logits[:, None], cache.length[:, None])[:, 0]
    step = SpeculativeStep(verifier, drafter, shape, choose, cache, hidden, root)
    mx.async_eval(root, hidden)
    ahead = None
    if max_tokens != 1:
        ahead = step()
        mx.async_eval(step.results(ahead))
    yield Produced(_wait_for(root), logits, [False], from_prompt=True)
    made, length = 1, int(cache.layers[0].offset)
    while made != max_tokens and ahead is not None:
        current, ahead = ahead, None
        # Step t brings at least one token; t + 1 is only of use if that is not the last.
        if max_tokens < 0 or made + 1 < max_tokens:
            ahead = step()
            mx.async_eval(step.results(ahead))
        [count] = _wait_for(current.count)
        tokens = _wait_for(current.tokens[0, : count + 1])
        length += count + 1
        cache.tighten(length + (0 if ahead is None else 1 + step.most))
        yield Produced(tokens, current.logits[0], [True] * count + [False])
        made += count + 1
        if 0 <= max_tokens <= made:
            break


def autoregressive(
    target: Target,
    prompt: mx.array,
    cache: list[Any],
    choose: Chooser,
    max_tokens: int,
    prefill_step_size: int = 2048,
    progress: Progress | None = None,
) -> Generator[Produced]:
    """Decodes plainly, one token per call of the target (batch size 1).

    Args:
        cache: mlx-lm caches of any kind; they hold the prompt and every token yielded.

    Yields:
        One token at a time.
    """
    position = prompt.shape[1] + _cached(cache)
    _, logits = prefill(target, prompt, cache, prefill_step_size, progress)
    made = 0
    token = choose(logits[:, None], mx.array([[position]]))
    mx.async_eval(token)
    while made != max_tokens:
        current, current_logits = token, logits
        made += 1
        position += 1
        _, logits = target.forward(current, cache)
        logits = logits[:, -1]
        token = choose(logits[:, None], mx.array([[position]]))
        mx.async_eval(token)
        yield Produced(_wait_for(current[0]), current_logits, [False], from_prompt=made == 1)
        if made % 256 == 0:
            mx.clear_cache()


def _cached(cache: list[Any]) -> int:
    """Tokens that mlx-lm caches hold."""
    return max((int(c.offset) for c in cache if isinstance(getattr(c, "offset", None), int)), default=0)


def _wait_for(tokens: mx.array) -> list[int]:
    """The host's copy of a few whole numbers, (n,), once the device has them."""
    values: Any = tokens.tolist()
    return values
