"""Text in, text out: streaming generation, as mlx-lm's own but for one argument."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import wired_limit
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.decoding.logits_processors import LogitsProcessor
from mlx_redrafter.decoding.loop import autoregressive, speculative
from mlx_redrafter.decoding.options import DecodingOptions, Progress
from mlx_redrafter.decoding.planner import Planner
from mlx_redrafter.decoding.sampling import Chooser, from_sampler, greedy
from mlx_redrafter.decoding.step import Produced
from mlx_redrafter.drafting.kinds import Drafter, method_of
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.drafting.proposers import Proposer
from mlx_redrafter.drafting.shape import AUTO, LOOKUPS, OFF, DraftShape
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.cache.kv_cache import KVCache, cached
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import NONE, Verifier
from mlx_redrafter.text.prompts import encode
from mlx_redrafter.text.responses import GenerationResponse, responses, summary
from mlx_redrafter.tuning.session import drafting_for


def stream_generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper | Any,
    prompt: str | list[int] | mx.array,
    drafter: Drafter | None = None,
    *,
    max_tokens: int = 256,
    sampler: Callable[[mx.array], mx.array] | None = None,
    chooser: Chooser | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
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
        prompt: text, or token ids.
        drafter: made for this model, recurrent or Medusa; None decodes plainly, or with lookup alone.
        max_tokens: stop after this many; -1 for no limit.
        sampler: an mlx-lm sampler; greedy if left out. Exact in distribution. Trees are better chosen
            with a `chooser`, whose temperature is known.
        chooser: in place of a sampler, a function from `mlx_redrafter.decoding.sampling`; with one
            that is keyed by position a seed gives the same text with and without a drafter.
        logits_processors: mlx-lm's; each sees exactly the tokens on the path to its row.
            The next step then waits for this one, which costs some of the speed.
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
            that was made for another model, a value out of range.
    """
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    if max_tokens == 0 or max_tokens < -1:
        raise UserError(f"--max-tokens is {max_tokens}, expected 1 or more, or -1 for no limit")
    if prefill_step_size < 1:
        raise UserError(f"--prefill-step-size is {prefill_step_size}, expected 1 or more")
    if quantized_kv_start < 0:
        raise UserError(f"--quantized-kv-start is {quantized_kv_start}, expected 0 or more")
    if kv_bits not in (None, 2, 4, 8):
        raise UserError(f"--kv-bits is {kv_bits}, expected 2, 4 or 8")
    if sampler is not None and chooser is not None:
        raise UserError("sampler and chooser were both given, expected one")
    if lookup is None:
        lookup = AUTO if drafter is not None and shape == AUTO else OFF
    if lookup not in LOOKUPS:
        raise UserError(f"--lookup is {lookup!r}, expected one of {', '.join(LOOKUPS)}")
    if not isinstance(shape, DraftShape) and shape != AUTO:
        raise UserError(f"shape is {shape!r}, expected a DraftShape or {AUTO!r}")
    ids = mx.array(encode(tokenizer, prompt), mx.int32)[None]
    target = Target.of(model)
    _check_prompt(target, ids.shape[1] + cached(prompt_cache or []))
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
    verifier, session, reason = None, None, ""
    if drafter is None and shape == AUTO:
        shape = DraftShape()
    if drafter is not None or lookup != OFF:
        verifier, reason = _verifier(model, drafter, shape, prompt_cache)
    if verifier is None:
        cache = make_prompt_cache(model) if prompt_cache is None else prompt_cache
        source, method = autoregressive(target, ids, cache, options), "plain"
    else:
        fixed = shape if isinstance(shape, DraftShape) else None
        read: Any = ids[0].tolist()
        text = [*cached_tokens, *read]
        proposer, planner, session = drafting_for(verifier, drafter, fixed, lookup, text, options.choose)
        method = method_of(drafter)
        source = _drafting(verifier, proposer, ids, prompt_cache, options, planner)
    try:
        with wired_limit(model):
            yield from responses(source, tokenizer, ids.shape[1], max_tokens, stop, method, reason)
    finally:
        if session is not None:
            session.save()


def generate(model: nn.Module, tokenizer: Any, prompt: str | list[int], verbose: bool = False, **kwargs: Any) -> str:
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


def _check_prompt(target: Target, length: int) -> None:
    limit = target.context_length
    if limit is not None and length >= limit:
        raise UserError(f"the prompt has {length} tokens, expected fewer than the model's context of {limit}")


def _verifier(
    model: nn.Module, drafter: Drafter | None, shape: DraftShape | str, prompt_cache: list[Any] | None
) -> tuple[Verifier | None, str]:
    """The model's verifier, or None and why drafts cannot be used."""
    verifier = verifier_of(model)
    if verifier.capability == NONE:
        return None, verifier.reason
    if drafter is not None:
        check_pair(verifier.target, drafter)
    if isinstance(shape, DraftShape):
        shape.check(verifier.target.vocab_size if drafter is None else drafter.config.scored)
    if prompt_cache is not None and not KVCache.takes(prompt_cache):
        return None, "the prompt cache is of a kind that cannot take back rejected tokens"
    return verifier, ""


def _drafting(
    verifier: Verifier,
    proposer: Proposer,
    ids: mx.array,
    prompt_cache: list[Any] | None,
    options: DecodingOptions,
    planner: Planner,
) -> Generator[Produced]:
    """Speculative decoding whose rows end up in the caller's cache, exactly those of what was yielded."""
    cache = verifier.make_cache() if prompt_cache is None else verifier.adopt(prompt_cache)
    held, max_tokens = cached(prompt_cache or []), options.max_tokens
    yielded: list[int] = []
    source = speculative(verifier, proposer, ids, cache, options, planner)
    try:
        for produced in source:
            if max_tokens >= 0:
                del produced.tokens[max_tokens - len(yielded) :]
            # Token by token, so that the caller can stop between any two.
            for i, token in enumerate(produced.tokens):
                yielded.append(token)
                part = slice(i, i + 1)
                last = i + 1 == len(produced.tokens)
                yield dataclasses.replace(
                    produced, tokens=[token], logits=produced.logits[part], drafted=produced.drafted[part], last=last
                )
    finally:
        source.close()
        if prompt_cache is not None and cache.length is not None:
            # The last token's row is missing where no later step has read it.
            cache.end_trees(held + ids.shape[1] + max(0, len(yielded) - 1))
            if yielded:
                verifier.target.forward(mx.array([[yielded[-1]]]), cache.layers)
            cache.give_back(prompt_cache)
            mx.eval([c.state for c in prompt_cache])
