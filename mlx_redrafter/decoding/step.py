"""One step of speculative decoding as one lazy graph, the prompt before it, and the options of both.

Knows nothing of loops and text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import mlx.core as mx

from mlx_redrafter.constraints.matcher import Grown, Matcher
from mlx_redrafter.decoding.constrained import FARTHEST, mask, prune
from mlx_redrafter.decoding.logits_processors import LogitsProcessor, process_tree
from mlx_redrafter.decoding.planner import Odds
from mlx_redrafter.decoding.sampling import Chooser, greedy
from mlx_redrafter.drafting.proposers import Proposer
from mlx_redrafter.drafting.shape import PLAIN, Drafted, Forced, Plain, Plan
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.cache.kv_cache import KVCache, cached, quantize_layers
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import CHAIN, Verifier, accept

Progress = Callable[[int, int], None]  # prompt tokens read so far, and in all


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
    """What plain and speculative decoding have in common.

    Args:
        choose: how the target chooses.
        max_tokens: stop after this many; -1 for no limit.
        processors: mlx-lm's logits processors; they see the prompt and all tokens after it.
        matcher: what a text has to be, at its beginning; follows one text. None for anything.
        prefill_step_size: prompt tokens read at a time.
        progress: called with the prompt tokens read so far and in all.
        keep_logits: give the logits of what a step produced to who asked for it; False where nobody looks at them.
        kv_bits, kv_group_size, quantized_kv_start: keep the KV cache in so many bits once
            it holds so many rows; None keeps it as it is.

    Raises:
        UserError: a value out of range.
    """

    choose: Chooser = greedy
    max_tokens: int = 256
    processors: Sequence[LogitsProcessor] = ()
    matcher: Matcher | None = None
    prefill_step_size: int = 2048
    progress: Progress | None = None
    keep_logits: bool = True
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000

    def __post_init__(self) -> None:
        if self.max_tokens == 0 or self.max_tokens < -1:
            raise UserError(f"max_tokens is {self.max_tokens}, expected 1 or more, or -1 for no limit")
        if self.prefill_step_size < 1:
            raise UserError(f"prefill_step_size is {self.prefill_step_size}, expected 1 or more")
        if self.quantized_kv_start < 0:
            raise UserError(f"quantized_kv_start is {self.quantized_kv_start}, expected 0 or more")
        if self.kv_bits not in (None, 2, 4, 8):
            raise UserError(f"kv_bits is {self.kv_bits}, expected 2, 4 or 8")

    def quantize(self, layers: list[Any], length: int) -> None:
        """Quantises mlx-lm caches, or ours, that hold so many rows, where it is time for it."""
        if self.kv_bits is not None and length >= self.quantized_kv_start:
            quantize_layers(layers, self.kv_group_size, self.kv_bits)


@dataclasses.dataclass
class Produced:
    """What one step brought.

    Attributes:
        tokens: the new tokens, at least one.
        logits: (len(tokens) or more, vocab_size) the target's, row i for tokens[i]; lazy. (..., 0) where nobody
            looks at them, see `DecodingOptions`: they would be the largest thing that outlives a step.
        drafted: whether tokens[i] had been drafted; all but the last of a speculative step.
        from_prompt: True for a token that follows the prompt and that no step made.
        last: False for a part of a step's tokens that more of them follow.
        plan: what the step drafted.
        drafts: rows of the step that somebody had drafted and that could be right or wrong.
        forced: places in the tokens of the whole step that a grammar forced.
    """

    tokens: list[int]
    logits: mx.array
    drafted: list[bool]
    from_prompt: bool = False
    last: bool = True
    plan: Plan = PLAIN
    drafts: int = 0
    forced: Collection[int] = ()

    def one_by_one(self) -> Iterator[Produced]:
        """The same, token by token."""
        for i, token in enumerate(self.tokens):
            logits, drafted, last = self.logits[i : i + 1], self.drafted[i : i + 1], i + 1 == len(self.tokens)
            yield dataclasses.replace(self, tokens=[token], logits=logits, drafted=drafted, last=self.last and last)


@dataclasses.dataclass
class Submitted:
    """A step's results while the device is still at it.

    `most` is the largest count it can have; `path` and `parents` are those of a tree, and
    None where rows lie in order. The first `certain` rows behind the root were forced, and nobody's drafts.
    Behind the rows in `forced` a grammar forces the token; `drafted` (B, 1 + N) is False for rows behind those and
    for rows that only fill the shape, True for the root.
    """

    count: mx.array
    tokens: mx.array
    logits: mx.array
    most: int
    plan: Plan
    path: mx.array | None
    parents: mx.array | None
    drafted: mx.array
    certain: int = 0
    forced: Collection[int] = ()


def prefill(
    target: Target,
    prompt: mx.array,
    cache: list[Any],
    options: DecodingOptions,
    context_layers: tuple[int, ...] = (),
    last: int = 1,
) -> tuple[mx.array | None, mx.array]:
    """Reads a prompt in chunks, as mlx-lm does.

    Args:
        target: the model.
        prompt: (B, P) token ids, P at least 1.
        cache: one mlx-lm cache per layer; may already hold the tokens before the prompt.
        context_layers: which hidden states to give; see `Target.forward`.
        last: of how many prompt tokens to give them, if there are so many.

    Returns:
        hidden (B, m, context_size) of the last m prompt tokens, where the target gives them, and
        logits (B, vocab_size) of the last one; lazy.
    """
    total, read = prompt.shape[1], 0
    held = cached(cache)
    before: list[mx.array] = []  # hidden states of the chunks before
    while total - read > 1:
        if options.progress is not None:
            options.progress(read, total)
        chunk = prompt[:, read : min(read + options.prefill_step_size, total - 1)]
        hidden, _ = target.forward(chunk, cache, context_layers=context_layers)  # nothing computes its logits
        read += chunk.shape[1]
        if hidden is not None and last > 1:
            before = [mx.concatenate([*before, hidden], axis=1)[:, 1 - last :]]
        if options.kv_bits is not None:
            options.quantize(cache, held + read)
        mx.eval([c.state for c in cache], before)
        mx.clear_cache()
    hidden, logits = target.forward(prompt[:, read:], cache, context_layers=context_layers)
    if options.kv_bits is not None:
        options.quantize(cache, held + total)
    if options.progress is not None:
        mx.eval(logits)
        options.progress(total, total)
    return None if hidden is None else mx.concatenate([*before, hidden], axis=1), logits[:, -1]


class SpeculativeStep:
    """One round of proposing, verification, acceptance and commit, as one lazy graph.

    It begins behind a prompt, with what `prefill` gave and the token that the target chose.
    Calling it builds the graph for the next step from the state the last one left and
    returns its results unevaluated. Nothing is read by the host, unless there are logits
    processors (see `logits_processors`) or a constraint (see `constrained`).

    Attributes:
        proposer: whose candidates are verified.
        context: (B, context_size) the target's hidden states at the last committed token.
        root: (B,) int32 the token the target has chosen and not yet read.
        history: (n,) all tokens before the root, for logits processors.
    """

    def __init__(
        self,
        verifier: Verifier,
        proposer: Proposer,
        options: DecodingOptions,
        cache: KVCache,
        contexts: mx.array,
        root: mx.array,
        history: mx.array | None = None,
    ):
        self.verifier, self.proposer, self.options, self.cache = verifier, proposer, options, cache
        self.context, self.root, self.history = contexts[:, -1], root, history

    def __call__(self, plan: Plan, odds: Odds | None = None) -> Submitted:
        cache, proposer = self.cache, self.proposer
        assert cache.length is not None
        matcher, chain_only = self.options.matcher, self.verifier.capability == CHAIN
        ranks, certain = self.verifier.target.ranks, list[int]()
        if isinstance(plan, Plain | Forced):
            tree = CandidateTree.chain(self.root[:, None].astype(mx.int32))
        else:
            if matcher is not None and proposer.from_any_root and isinstance(plan, Drafted):
                certain = matcher.forced(FARTHEST)
            root = mx.array(certain[-1:]) if certain else self.root
            tree = proposer.propose(self.context, root, plan, chain_only=chain_only)
            if ranks is not None:
                tree = tree.agreed(ranks)
        grown: Grown | None = None
        if matcher is not None and not isinstance(plan, Plain):
            grown = prune(matcher, tree, plan, chain_only, odds or Odds(), self.root, certain)
            tree = CandidateTree.static(mx.array([grown.tokens], mx.int32), tuple(grown.parents))
        hidden, logits = self.verifier(tree, cache, proposer.context_layers)
        if self.options.processors:
            logits = self.process(tree, logits)
        if matcher is not None:
            logits = mask(matcher, logits, *((grown.tokens, grown.parents) if grown is not None else ()))
        choices = self.options.choose(logits, cache.length[:, None] + tree.depths + 1)
        if ranks is not None:
            choices = ranks.agree(choices)
        accepted = accept(tree, choices)
        cache.commit(None if tree.in_order else accepted.path[:, 1:], accepted.count, tree.max_depth)
        proposer.advance(accepted, hidden)
        self.root = accepted.root
        if tree.rows > 1:
            hidden = mx.take_along_axis(hidden, accepted.last[:, None, None], axis=1)
        self.context = hidden[:, 0]
        if not self.options.keep_logits:
            logits = mx.zeros((*accepted.tokens.shape, 0), logits.dtype)
        elif not tree.in_order:
            logits = mx.take_along_axis(logits, accepted.path[..., None], axis=1)
        path, parents = (None, None) if tree.in_order else (accepted.path, tree.parents)
        drafted, forced = (tree.valid, ()) if grown is None else (mx.array([grown.drafted]), grown.forced)
        return Submitted(
            accepted.count, accepted.tokens, logits, tree.max_depth, plan, path, parents, drafted, len(certain), forced
        )

    def process(self, tree: CandidateTree, logits: mx.array) -> mx.array:
        """Logits (B, 1 + N, vocab) after the logits processors."""
        assert self.history is not None
        return process_tree(self.options.processors, self.history, tree, logits)

    def submit(self, plan: Plan, odds: Odds | None = None) -> Submitted:
        """Builds a step and sends it to the device; under a constraint it goes by the odds."""
        submitted = self(plan, odds)
        read = submitted.count, submitted.tokens, submitted.drafted
        arrays = [*read, self.root, self.context, *self.cache.arrays()]
        if submitted.path is not None and submitted.parents is not None:
            # Of a tree's logits no choice was made in this form.
            arrays += [submitted.path, submitted.parents, submitted.logits]
        mx.async_eval(arrays, self.proposer.arrays())
        return submitted
