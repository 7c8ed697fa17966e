"""Decodes step by step, speculatively or plainly, and lets threads take turns at the steps.

Knows nothing of text. A loop submits step t + 1 before it reads the tokens of step t: cache
length, context and root stay on the device, so building one graph hides behind the run of the
one before. While a step is built, stand-ins hang in the model: another thread that used it then
would meet them.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import Any, TypeVar

import mlx.core as mx

from mlx_redrafter.decoding.constrained import jump, mask
from mlx_redrafter.decoding.logits_processors import process
from mlx_redrafter.decoding.planner import Planner, StepRead
from mlx_redrafter.decoding.step import DecodingOptions, Produced, SpeculativeStep, Submitted, prefill
from mlx_redrafter.drafting.proposers import Proposer
from mlx_redrafter.drafting.shape import Plain
from mlx_redrafter.target.cache.kv_cache import KVCache, cached
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.verification import Verifier

T = TypeVar("T")


def speculative(
    verifier: Verifier,
    proposer: Proposer,
    prompt: mx.array,
    cache: KVCache,
    options: DecodingOptions,
    planner: Planner,
) -> Generator[Produced]:
    """Decodes with drafts (batch size 1).

    Args:
        verifier: with a capability other than "none".
        proposer: where the drafts come from.
        prompt: (1, P) token ids that the cache does not hold yet.
        cache: grows; `KVCache.end_trees` has to be called when the loop is left, early or not.
        planner: says what each step drafts.

    Yields:
        What each step brought. The last one may exceed `max_tokens`.
    """
    max_tokens, processors, matcher = options.max_tokens, options.processors, options.matcher
    # Either reads tokens on the host, so no step can be built ahead of the one before.
    waits = bool(processors) or matcher is not None
    length = cached(cache.layers) + prompt.shape[1]
    reads = proposer.context_layers, proposer.prefix_window
    hidden, logits = prefill(verifier.target, prompt, cache.layers, options, *reads)
    cache.begin_trees(length=length)
    assert cache.length is not None and hidden is not None
    history = prompt[0]
    if processors:
        logits = process(processors, history, logits)
    if matcher is not None:
        logits = mask(matcher, logits)
    root = options.choose(logits[:, None], cache.length[:, None])[:, 0]
    if (ranks := verifier.target.ranks) is not None:
        root = ranks.agree(root)
    step = SpeculativeStep(verifier, proposer, options, cache, hidden, root, history if processors else None)
    proposer.begin(prompt, root, hidden)
    # Whatever goes on to the next step is on its way: another thread, with other streams, may build that step.
    mx.async_eval(root, step.context, history, *cache.arrays(), *proposer.arrays())
    made, ahead = 1, None

    def submit(waiting: bool) -> Submitted | None:
        """The next step; None where it is better built when the one before has been read."""
        plan, odds = planner.plan(), None if matcher is None else planner.odds()
        if ranks is not None:
            plan, odds = ranks.share((plan, odds))
        if matcher is not None and odds is not None:
            plan = jump(matcher, plan, proposer.from_any_root, odds)
        if isinstance(plan, Plain) and not cache.plain_rows(length if waiting else None):
            return None
        return step.submit(plan, odds)

    if max_tokens != 1 and not waits:
        ahead = submit(waiting=True)
    tokens = wait_for(root)
    proposer.learn(tokens)
    if matcher is not None:
        matcher.take(tokens)
    yield Produced(tokens, logits, [False], from_prompt=True)
    while made != max_tokens:
        current, ahead = ahead or submit(waiting=True), None
        assert current is not None
        # Step t brings at least one token; t + 1 is only of use if that is not the last.
        if not waits and (max_tokens < 0 or made + 1 < max_tokens):
            ahead = submit(waiting=False)
        [count] = wait_for(current.count)
        before = tokens[-1:]  # the root that this step has read
        # A slice on the device would be an operation of its own, behind the step that is on its way already.
        tokens = wait_for(current.tokens)[0][: count + 1]
        made, length = made + count + 1, length + count + 1
        cache.tighten(length + (0 if ahead is None else 1 + ahead.most))
        proposer.learn(tokens)
        read = StepRead(current.plan, tokens, length, most=current.most, certain=current.certain)
        if current.path is not None and current.parents is not None:
            read.path, read.parents = wait_for(current.path)[0][: len(tokens)], wait_for(current.parents)[0]
        rows = range(len(tokens)) if read.path is None else read.path
        read.forced = [place for place, row in enumerate(rows) if row in current.forced]
        planner.learn(read)
        if matcher is not None:
            matcher.take(tokens)
        if step.history is not None:
            step.history = mx.concatenate([step.history, mx.array(before + tokens[:-1], prompt.dtype)])
            mx.async_eval(step.history)
        if options.kv_bits is not None:
            options.quantize(cache.layers, length)
        drafted, drafts = [True] * count + [False], sum(wait_for(current.drafted)[0]) - 1
        yield Produced(tokens, current.logits[0], drafted, plan=current.plan, drafts=drafts, forced=read.forced)
        if 0 <= max_tokens <= made:
            break


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
        if target.ranks is not None:
            token = target.ranks.agree(token)
        mx.async_eval(token, history)
        return token

    if options.processors:
        logits = process(options.processors, history, logits)
    if (matcher := options.matcher) is not None:
        logits = mask(matcher, logits)
    token = choose()
    while made != options.max_tokens:
        current, current_logits = token, logits
        made += 1
        position += 1
        _, logits = target.forward(current, cache)
        if options.kv_bits is not None:
            options.quantize(cache, position)
        logits = logits[:, -1]
        if options.processors:
            history = mx.concatenate([history, current[0]])
            logits = process(options.processors, history, logits)
        if matcher is not None:
            mx.async_eval(logits)  # the device goes on while the host reads the token
            matcher.take(wait_for(current)[0])
            logits = mask(matcher, logits)
        token = choose()
        yield Produced(wait_for(current)[0], current_logits, [False], from_prompt=made == 1)
        if made % 256 == 0:
            mx.clear_cache()


def wait_for(numbers: mx.array) -> Any:
    """The host's copy of a few whole numbers, as lists, once the device has them."""
    return numbers.tolist()


class Turns:
    """A lock for one thread at a time, which may take it again; who waits is served before who comes back."""

    def __init__(self) -> None:
        self._queue, self._lock = threading.RLock(), threading.RLock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            self._lock.acquire()
        else:
            with self._queue:
                self._lock.acquire()
        self._owner, self._depth = threading.get_ident(), self._depth + 1

    def __exit__(self, *_: Any) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
        self._lock.release()


TURNS = Turns()  # of all models: threads share the device, and drafters may be shared, too


def in_turns(steps: Generator[T]) -> Generator[T]:
    """The same items; each is made, and the end reached, while no other thread makes one."""
    try:
        while True:
            with TURNS:
                try:
                    item = next(steps)
                except StopIteration:
                    return
            yield item
    finally:
        with TURNS:
            steps.close()
