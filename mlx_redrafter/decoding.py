"""The step, and the two loops built on it: speculative and autoregressive decoding.

A loop submits step t + 1 before it reads the tokens of step t: cache length, context and
root stay on the device, so building one graph hides behind the run of the one before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any

import mlx.core as mx

from .acceptance import accept
from .drafter import RecurrentDrafter
from .early import submit_part
from .errors import UserError
from .heads import Drafter
from .kv_cache import KVCache, leaves
from .output_layer import tie
from .processors import process, process_tree
from .proposers import Proposer
from .settings import DecodingOptions, DraftShape
from .steering import Outcome, Steering
from .target import Target
from .verification import CHAIN, Verifier


def check_pair(target: Target, drafter: Drafter, name: str = "drafter") -> None:
    """Ties the drafter to the target where its config says so.

    Raises:
        UserError: the drafter was made for a target of another shape.
    """
    for field in ("hidden_size", "vocab_size"):
        found, expected = getattr(drafter.config, field), getattr(target, field)
        if found != expected:
            raise UserError(
                f"{name}: {field} is {found}, but the target's is {expected}; it was made for another model"
            )
    if isinstance(drafter, RecurrentDrafter):
        tie(drafter, target)


@dataclasses.dataclass
class Produced:
    """What one step brought.

    Attributes:
        tokens: the new tokens, at least one.
        logits: (len(tokens) or more, vocab_size) the target's, row i for tokens[i]; lazy.
        drafted: whether tokens[i] had been drafted; all but the last of a speculative step.
        from_prompt: True for the token that follows the prompt, which no step made.
        last: False for a part of a step's tokens that more of them follow.
        shape: how much the step drafted; None for a plain one.
    """

    tokens: list[int]
    logits: mx.array
    drafted: list[bool]
    from_prompt: bool = False
    last: bool = True
    shape: DraftShape | None = None


@dataclasses.dataclass
class _Submitted:
    """A step's results while the device is still at it.

    `most` is the largest count it can have; `path` and `parents` are those of a tree, and
    None where rows lie in order.
    """

    count: mx.array
    tokens: mx.array
    logits: mx.array
    most: int
    shape: DraftShape | None
    path: mx.array | None
    parents: mx.array | None

    def arrays(self) -> list[mx.array]:
        """What the host will read."""
        return [a for a in (self.count, self.tokens, self.path, self.parents) if a is not None]


def prefill(
    target: Target, prompt: mx.array, cache: list[Any], options: DecodingOptions
) -> tuple[mx.array | None, mx.array]:
    """Reads a prompt in chunks, as mlx-lm does.

    Args:
        target: the model.
        prompt: (B, P) token ids, P at least 1.
        cache: one mlx-lm cache per layer; may already hold the tokens before the prompt.

    Returns:
        hidden (B, hidden_size), where the target gives one, and logits (B, vocab_size) of
        the last prompt token; lazy.
    """
    total, read = prompt.shape[1], 0
    held = cached(cache)
    while total - read > 1:
        if options.progress is not None:
            options.progress(read, total)
        chunk = prompt[:, read : min(read + options.prefill_step_size, total - 1)]
        target.forward(chunk, cache)  # no logits are computed: nothing reads them
        read += chunk.shape[1]
        options.quantize(cache, held + read)
        mx.eval([c.state for c in cache])
        mx.clear_cache()
    hidden, logits = target.forward(prompt[:, read:], cache)
    options.quantize(cache, held + total)
    if options.progress is not None:
        mx.eval(logits)
        options.progress(total, total)
    return None if hidden is None else hidden[:, -1], logits[:, -1]


class SpeculativeStep:
    """One round of proposing, verification, acceptance and commit, as one lazy graph.

    Calling it builds the graph for the next step from the state the last one left and
    returns its results unevaluated. Nothing is read by the host, unless there are logits
    processors (see `processors`).

    Attributes:
        proposer: whose candidates are verified; its shape may change between steps.
        context: (B, hidden_size) the target's hidden state at the last committed token.
        root: (B,) int32 the token the target has chosen and not yet read.
        history: (n,) all tokens before the root, for logits processors.
    """

    def __init__(
        self,
        verifier: Verifier,
        proposer: Proposer,
        options: DecodingOptions,
        cache: KVCache,
        context: mx.array,
        root: mx.array,
        history: mx.array | None = None,
    ):
        self.verifier, self.proposer, self.options, self.cache = verifier, proposer, options, cache
        self.context, self.root, self.history = context, root, history

    def __call__(self) -> _Submitted:
        cache = self.cache
        assert cache.length is not None
        tree = self.proposer.propose(self.context, self.root, chain_only=self.verifier.capability == CHAIN)
        submit_part(tree.tokens, tree.ancestors)
        hidden, logits = self.verifier(tree, cache)
        if self.options.processors:
            assert self.history is not None
            logits = process_tree(self.options.processors, self.history, tree, logits)
        choices = self.options.choose(logits, cache.length[:, None] + tree.depths + 1)
        accepted = accept(tree, choices)
        cache.commit(None if tree.in_order else accepted.path[:, 1:], accepted.count, tree.max_depth)
        self.proposer.advance(accepted)
        self.root = accepted.root
        if tree.rows > 1:
            hidden = mx.take_along_axis(hidden, accepted.last[:, None, None], axis=1)
        self.context = hidden[:, 0]
        if not tree.in_order:
            logits = mx.take_along_axis(logits, accepted.path[..., None], axis=1)
        path, parents = (None, None) if tree.in_order else (accepted.path, tree.parents)
        shape = self.proposer.shape
        return _Submitted(accepted.count, accepted.tokens, logits, tree.max_depth, shape, path, parents)

    def submit(self) -> _Submitted:
        """Builds a step and sends it to the device."""
        submitted = self()
        mx.async_eval(submitted.arrays(), self.root, self.context, *self.cache.arrays(), *self.proposer.arrays())
        return submitted


def speculative(
    verifier: Verifier,
    proposer: Proposer,
    prompt: mx.array,
    cache: KVCache,
    options: DecodingOptions,
    steering: Steering | None = None,
) -> Generator[Produced]:
    """Decodes with drafts (batch size 1).

    Args:
        verifier: with a capability other than "none".
        proposer: where the drafts come from.
        prompt: (1, P) token ids that the cache does not hold yet.
        cache: grows; `KVCache.end_trees` has to be called when the loop is left, early or not.
        steering: chooses the shape that the proposer is asked for in every step; else it is the proposer's own.

    Yields:
        What each step brought. The last one may exceed `max_tokens`.
    """
    max_tokens, processors = options.max_tokens, options.processors
    held = cached(cache.layers)
    hidden, logits = prefill(verifier.target, prompt, cache.layers, options)
    cache.begin_trees(length=held + prompt.shape[1])
    assert cache.length is not None and hidden is not None
    logits = process(processors, prompt[0], logits)
    root = options.choose(logits[:, None], cache.length[:, None])[:, 0]
    step = SpeculativeStep(verifier, proposer, options, cache, hidden, root, prompt[0] if processors else None)
    mx.async_eval(root, hidden)
    proposer.begin(prompt, root)
    pipelined = not processors
    made, length, asked = 1, held + prompt.shape[1], proposer.shape

    def submit(waiting: bool) -> _Submitted | None:
        """The next step; None where it is better built when the one before has been read."""
        proposer.shape = proposer.plan(asked if steering is None else steering.shape())
        if proposer.shape is None and cache.can_settle and not cache.settled:
            if not waiting:
                return None
            cache.settle(length)
        return step.submit()

    try:
        ahead = submit(waiting=True) if max_tokens != 1 and pipelined else None
        tokens = _wait_for(root)
        proposer.learn(tokens)
        if steering is not None:
            steering.begin()
        yield Produced(tokens, logits, [False], from_prompt=True)
        while made != max_tokens:
            current = ahead or submit(waiting=True)
            assert current is not None
            ahead = None
            # Step t brings at least one token; t + 1 is only of use if that is not the last.
            if pipelined and (max_tokens < 0 or made + 1 < max_tokens):
                ahead = submit(waiting=False)
            [count] = _wait_for(current.count)
            before = tokens[-1:]  # the root that this step has read
            tokens = _row(current.tokens)[: count + 1]
            proposer.learn(tokens)
            made, length = made + count + 1, length + count + 1
            cache.tighten(length + (0 if ahead is None else 1 + ahead.most))
            if steering is not None:
                steering.learn(_outcome(current, count), length)
            if step.history is not None:
                step.history = mx.concatenate([step.history, mx.array(before + tokens[:-1], prompt.dtype)])
            options.quantize(cache.layers, length)
            yield Produced(tokens, current.logits[0], [True] * count + [False], shape=current.shape)
            if 0 <= max_tokens <= made:
                break
    finally:
        proposer.shape = asked  # what was planned for this text is nothing to the next one


def autoregressive(target: Target, prompt: mx.array, cache: list[Any], options: DecodingOptions) -> Generator[Produced]:
    """Decodes plainly, one token per call of the target (batch size 1).

    Args:
        cache: mlx-lm caches of any kind; they hold the prompt and every token yielded.

    Yields:
        One token at a time.
    """
    position = prompt.shape[1] + cached(cache)
    _, logits = prefill(target, prompt, cache, options)
    history = prompt[0]
    made = 0

    def choose() -> mx.array:
        token = options.choose(logits[:, None], mx.array([[position]]))
        mx.async_eval(token)
        return token

    logits = process(options.processors, history, logits)
    token = choose()
    while made != options.max_tokens:
        current, current_logits = token, logits
        made += 1
        position += 1
        _, logits = target.forward(current, cache)
        options.quantize(cache, position)
        logits = logits[:, -1]
        if options.processors:
            history = mx.concatenate([history, current[0]])
            logits = process(options.processors, history, logits)
        token = choose()
        yield Produced(_row(current), current_logits, [False], from_prompt=made == 1)
        if made % 256 == 0:
            mx.clear_cache()


def _outcome(step: _Submitted, count: int) -> Outcome:
    """What the host has read of a step whose count it knows."""
    if step.path is None or step.parents is None:
        return Outcome(step.shape, count, [1] * step.most, [0] * count)
    return Outcome.of_tree(step.shape, _row(step.path)[: count + 1], _row(step.parents))


def cached(layers: list[Any]) -> int:
    """Tokens that mlx-lm caches hold."""
    return max((int(c.offset) for c in leaves(layers) if isinstance(getattr(c, "offset", None), int)), default=0)


def _wait_for(numbers: mx.array) -> Any:
    """The host's copy of a few whole numbers, as lists, once the device has them."""
    return numbers.tolist()


def _row(numbers: mx.array) -> list[int]:
    """The same of (1, n). A slice would be an operation of its own, behind the step that is on its way already."""
    return _wait_for(numbers)[0]
