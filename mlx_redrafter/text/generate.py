"""Streams text, with mlx-lm's interface and one more argument, the drafter. Knows nothing of commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import wired_limit
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.constraints.constraint import Constraint
from mlx_redrafter.constraints.matcher import Matcher
from mlx_redrafter.decoding.logits_processors import LogitsProcessor
from mlx_redrafter.decoding.loop import TURNS, autoregressive, in_turns, speculative, wait_for
from mlx_redrafter.decoding.planner import Planner
from mlx_redrafter.decoding.sampling import Chooser, from_sampler, greedy
from mlx_redrafter.decoding.step import DecodingOptions, Produced, Progress
from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.drafting.proposers import Proposer
from mlx_redrafter.drafting.shape import AUTO, LOOKUPS, OFF, DraftShape
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.threads import InUse
from mlx_redrafter.target.cache.kv_cache import cached, refused
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.verification import NONE, Verifier
from mlx_redrafter.text.prompts import Prompt, encode
from mlx_redrafter.text.responses import GenerationResponse, responses, summary
from mlx_redrafter.tuning.session import Session, drafting_for, verifier_for

_CACHES = InUse()


def stream_generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper | Any,
    prompt: Prompt,
    drafter: Drafter | None = None,
    *,
    max_tokens: int = 256,
    sampler: Callable[[mx.array], mx.array] | None = None,
    chooser: Chooser | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    constraint: Constraint | None = None,
    stop: Sequence[str] = (),
    shape: DraftShape | str = AUTO,
    lookup: str | None = None,
    prompt_cache: list[Any] | None = None,
    cached_tokens: Sequence[int] = (),
    prefill_step_size: int = 2048,
    prompt_progress_callback: Progress | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
) -> Generator[GenerationResponse]:
    """Generates text, drafting where a drafter is given or lookup is on.

    Args:
        model: an mlx-lm model.
        tokenizer: its tokenizer.
        prompt: text, or token ids as a list or array of shape (n,) or (1, n).
        drafter: made for this model, recurrent or Medusa; None decodes plainly, or with lookup alone.
        max_tokens: stop after this many; -1 for no limit.
        sampler: an mlx-lm sampler; greedy if left out. Exact in distribution. Trees are better chosen
            with a `chooser`, whose temperature is known.
        chooser: in place of a sampler, a function from `mlx_redrafter.decoding.sampling`; with one
            that is keyed by position a seed gives the same text with and without a drafter.
        logits_processors: mlx-lm's; each sees exactly the tokens on the path to its row.
            The next step then waits for this one, which costs some of the speed.
        constraint: what the text has to be, from `mlx_redrafter.constraints.constraint`. Drafts that it forbids
            are not verified, and tokens that it forces are drafted, with a drafter or without.
        stop: texts that end the generation. They are not given out, nor is what follows.
        shape: beam width, beam length, node budget and tree policy; or "auto", which goes by
            what steps cost here (measured at first use, in about two seconds, and kept) and
            by what is accepted, and decodes plainly while drafting does not pay. For lookup
            alone, "auto" is `DraftShape()`.
        lookup: "on" drafts what followed in the text so far where it last went like now,
            together with the drafter or alone; "auto" does so in steps where that pays; or "off".
            Left out, it is "auto" with a drafter whose shape is "auto", else "off".
        prompt_cache: mlx-lm caches; go on from what they hold, and leave in them the
            prompt and every token that was yielded.
        cached_tokens: what the prompt cache holds, where that is known: for lookup.
        prefill_step_size: prompt tokens read at a time.
        prompt_progress_callback: called with prompt tokens read so far and in all.
        kv_bits, kv_group_size, quantized_kv_start: quantise the KV cache to 8, 4 or 2 bits
            once it holds so many rows. Texts with and without a drafter are equal if it
            does by the end of the prompt.

    Yields:
        A response per token, and a last one with a finish_reason.

    Raises:
        UserError: a prompt that is empty or longer than the model can read, a drafter
            that was made for another model, a value out of range, a prompt cache that another
            generation still writes to.

    Threads may generate with one model at once: their steps take turns. A generation may be
    continued in another thread than it was begun in.
    """
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    if sampler is not None and chooser is not None:
        raise UserError("sampler and chooser were both given, expected one")
    options = DecodingOptions(
        choose=chooser or (from_sampler(sampler) if sampler is not None else greedy),
        max_tokens=max_tokens,
        processors=tuple(logits_processors or ()),
        prefill_step_size=prefill_step_size,
        progress=prompt_progress_callback,
        kv_bits=kv_bits,
        kv_group_size=kv_group_size,
        quantized_kv_start=quantized_kv_start,
    )
    fixed, lookup = what_to_draft(drafter, shape, lookup)
    ids = encode(tokenizer, prompt)
    refusal = "prompt_cache is in use by a generation that has not ended: close() that one first"
    alone = _CACHES.alone([prompt_cache, *prompt_cache], refusal) if prompt_cache is not None else nullcontext()
    with alone:
        with TURNS:
            target = Target.of(model)
            if target.ranks is not None:  # a template may have put in the date, which is not the same everywhere
                ids, cached_tokens = target.ranks.share((ids, list(cached_tokens)))
            if constraint is not None:
                matcher = Matcher(constraint, tokenizer, target.vocab_size or len(tokenizer))
                options = dataclasses.replace(options, matcher=matcher)
            check_prompt(target, ids, cached(prompt_cache or []))
            source, method, reason = steps_of(target, drafter, ids, options, fixed, lookup, prompt_cache, cached_tokens)
        yield from responses(in_turns(source), tokenizer, len(ids), max_tokens, stop, method, reason)


def generate(model: nn.Module, tokenizer: Any, prompt: Prompt, verbose: bool = False, **kwargs: Any) -> str:
    """The whole text at once; `verbose` prints it as it comes, and the figures after it.

    Args:
        kwargs: see `stream_generate`.
    """
    text, response = "", None
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if verbose and response is not None:
        print("\n" + summary(response))
    return text


def what_to_draft(
    drafter: Drafter | None, shape: DraftShape | str, lookup: str | None
) -> tuple[DraftShape | None, str]:
    """Shape, None to choose one, and lookup, what was left out filled in. Raises UserError for what they cannot be."""
    fixed = shape if isinstance(shape, DraftShape) else None
    if fixed is None and shape != AUTO:
        raise UserError(f"shape is {shape!r}, expected a DraftShape or {AUTO!r}")
    if lookup is None:
        lookup = AUTO if drafter is not None and fixed is None else OFF
    if lookup not in LOOKUPS:
        raise UserError(f"lookup is {lookup!r}, expected one of {', '.join(LOOKUPS)}")
    return DraftShape() if drafter is None and fixed is None else fixed, lookup


def check_prompt(target: Target, ids: list[int], held: int) -> None:
    """Raises UserError for a prompt that a target cannot read behind so many tokens."""
    length, limit = held + len(ids), target.context_length
    if limit is not None and length >= limit:
        raise UserError(f"the prompt has {length} tokens, expected fewer than the model's context of {limit}")
    if wrong := [token for token in ids if not 0 <= token < (target.vocab_size or 2**31)]:
        raise UserError(f"the prompt has the token id {wrong[0]}, expected 0 to {(target.vocab_size or 2**31) - 1}")


def steps_of(
    target: Target,
    drafter: Drafter | None,
    ids: list[int],
    options: DecodingOptions,
    fixed: DraftShape | None,
    lookup: str,
    prompt_cache: list[Any] | None,
    cached_tokens: Sequence[int],
) -> tuple[Generator[Produced], str, str]:
    """The steps of a text, one token at a time; by which method, and why not by that which was asked for.

    Building them is a turn; see `in_turns`. Arguments are those of `stream_generate`, with nothing left out; see
    `what_to_draft`.
    """
    model, prompt = target.model, mx.array([ids], mx.int32)
    verifier, reason = None, ""
    if drafter is not None or lookup != OFF or (options.matcher is not None and options.matcher.jump_ahead):
        verifier = verifier_for(model, drafter)
        if verifier.capability == NONE:
            reason, verifier = verifier.reason, None
        else:
            if fixed is not None:
                fixed.check(target.vocab_size if drafter is None else drafter.config.scored)
            if prompt_cache is not None and refused(prompt_cache):
                verifier, reason = None, "the prompt cache is of a kind that cannot take back rejected tokens"
    if verifier is None:
        cache = make_prompt_cache(model) if prompt_cache is None else prompt_cache
        return _wired(model, autoregressive(target, prompt, cache, options)), "plain", reason
    proposer, planner, session = drafting_for(
        verifier, drafter, fixed, lookup, [*cached_tokens, *ids], options.choose, options.matcher is not None
    )
    source = _drafting(verifier, proposer, prompt, prompt_cache, options, planner)
    alone = "grammar" if lookup == OFF else "lookup"
    return _wired(model, source, session), alone if drafter is None else drafter.method, verifier.reason


def _wired(model: nn.Module, source: Generator[Produced], session: Session | None = None) -> Generator[Produced]:
    """The same steps, with memory wired as in mlx-lm; then keeps what they taught."""
    with wired_limit(model):
        try:
            yield from source
        finally:
            source.close()
            if session is not None:
                session.save()


def _drafting(
    verifier: Verifier,
    proposer: Proposer,
    ids: mx.array,
    prompt_cache: list[Any] | None,
    options: DecodingOptions,
    planner: Planner,
) -> Generator[Produced]:
    """Speculative decoding whose rows end up in the caller's cache, exactly those of what was yielded."""
    cache = verifier.make_cache(prompt_cache)
    held, max_tokens = cached(prompt_cache or []), options.max_tokens
    if prompt_cache:
        proposer.resume(prompt_cache[0], held)
    yielded: list[int] = []
    source = speculative(verifier, proposer, ids, cache, options, planner)
    try:
        for produced in source:
            if max_tokens >= 0:
                del produced.tokens[max_tokens - len(yielded) :]
            # Token by token, so that the caller can stop between any two.
            for part in produced.one_by_one():
                yielded += part.tokens
                yield part
    finally:
        source.close()
        if prompt_cache is not None and cache.length is not None:
            # The last token's row is missing where no later step has read it.
            rows, committed = held + ids.shape[1] + max(0, len(yielded) - 1), wait_for(cache.length)[0]
            cache.end_trees(rows)
            context = None
            if yielded:
                last_token = mx.array([[yielded[-1]]])
                context, _ = verifier.target.forward(last_token, cache.layers, proposer.context_layers)
            cache.give_back(prompt_cache)
            mx.eval([c.state for c in prompt_cache], [] if context is None else context)
            if context is not None and prompt_cache:
                proposer.leave(prompt_cache[0], rows + 1, committed - rows, context)
