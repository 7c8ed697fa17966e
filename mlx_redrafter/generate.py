"""Text in, text out: streaming responses with statistics, as mlx-lm's own but for one argument."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import wired_limit
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .decoding import DraftShape, Produced, Progress, autoregressive, check_pair, speculative
from .drafter import RecurrentDrafter
from .errors import UserError
from .kv_cache import KVCache
from .sampling import Chooser, from_sampler, greedy
from .target import Target
from .verification import NONE, Verifier, verifier_of


@dataclasses.dataclass
class Statistics:
    """How the drafts fared.

    Attributes:
        steps: verifications that the text so far took.
        accepted: accepted[d - 1] is the number of steps that got at least d draft tokens in.
    """

    steps: int = 0
    accepted: list[int] = dataclasses.field(default_factory=list)

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per step, the target's own one included; 1.0 without drafts."""
        return 1 + sum(self.accepted) / self.steps if self.steps else 1.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of steps that got at least d draft tokens accepted, d = 1, 2, ..."""
        return [n / self.steps for n in self.accepted]


@dataclasses.dataclass
class GenerationResponse:
    """A piece of text and where generation stands; mlx-lm's fields first, in its order.

    Attributes:
        text: the next segment; may be empty.
        token: the token it ends with.
        logprobs: (vocab_size,) log-probabilities the token was chosen from; lazy.
        from_draft: whether the token had been drafted.
        prompt_tokens, prompt_tps: length of the prompt, and tokens per second reading it.
        generation_tokens, generation_tps: tokens so far, and per second.
        peak_memory: in GB.
        finish_reason: "stop", "length" or None while it goes on.
        steps, mean_acceptance_length, acceptance_by_position: see `Statistics`.
        method: "redrafter", or "plain".
        reason: why a given drafter was not used, for people; empty otherwise.
    """

    text: str
    token: int
    logprobs: mx.array
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None
    steps: int = 0
    mean_acceptance_length: float = 1.0
    acceptance_by_position: list[float] = dataclasses.field(default_factory=list)
    method: str = "plain"
    reason: str = ""


def stream_generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper | Any,
    prompt: str | list[int] | mx.array,
    drafter: RecurrentDrafter | None = None,
    *,
    max_tokens: int = 256,
    sampler: Callable[[mx.array], mx.array] | None = None,
    chooser: Chooser | None = None,
    shape: DraftShape | None = None,
    prompt_cache: list[Any] | None = None,
    prefill_step_size: int = 2048,
    prompt_progress_callback: Progress | None = None,
) -> Generator[GenerationResponse]:
    """Generates text, drafting where a drafter is given.

    Args:
        model: an mlx-lm model.
        tokenizer: its tokenizer.
        prompt: text, or token ids.
        drafter: made for this model; None decodes plainly.
        max_tokens: stop after this many; -1 for no limit.
        sampler: an mlx-lm sampler; greedy if left out. Exact in distribution.
        chooser: in place of a sampler, a function from `mlx_redrafter.sampling`; with one
            that is keyed by position a seed gives the same text with and without a drafter.
        shape: beam width, beam length, node budget and tree policy.
        prompt_cache: mlx-lm caches; go on from what they hold, and leave in them the
            prompt and every token that was yielded.
        prefill_step_size: prompt tokens read at a time.
        prompt_progress_callback: called with prompt tokens read so far and in all.

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
    if sampler is not None and chooser is not None:
        raise UserError("sampler and chooser were both given, expected one")
    shape = shape or DraftShape()
    ids = mx.array(encode(tokenizer, prompt), mx.int32)[None]
    choose = chooser or (from_sampler(sampler) if sampler is not None else greedy)
    held = _held(prompt_cache)
    _check_prompt(model, ids.shape[1] + held)
    verifier, reason = None, ""
    if drafter is not None:
        verifier, reason = _verifier(model, drafter, shape, prompt_cache)
    common = (choose, max_tokens, prefill_step_size, prompt_progress_callback)
    if verifier is None:
        source = _plainly(Target(model), ids, prompt_cache, *common)
    else:
        assert drafter is not None
        source = _drafting(verifier, drafter, ids, prompt_cache, shape, *common)
    with wired_limit(model):
        yield from _responses(source, tokenizer, ids.shape[1], max_tokens, verifier is not None, reason)


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


def summary(response: GenerationResponse) -> str:
    """A finished response's figures in three lines, as mlx-lm prints them."""
    lines = [
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec",
        f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.3f} tokens-per-sec",
        f"Peak memory: {response.peak_memory:.3f} GB",
    ]
    if response.method != "plain":
        rates = " ".join(f"{rate:.0%}" for rate in response.acceptance_by_position)
        lines.append(
            f"Mean acceptance length: {response.mean_acceptance_length:.2f} over {response.steps} steps"
            f" (by position: {rates})"
        )
    elif response.reason:
        lines.append(f"Decoded without drafts: {response.reason}")
    return "\n".join(lines)


def encode(tokenizer: TokenizerWrapper, prompt: str | list[int] | mx.array) -> list[int]:
    """Token ids of a prompt, special tokens added to text as mlx-lm does. Raises UserError if empty."""
    if isinstance(prompt, mx.array):
        ids = [int(token) for token in prompt]
    elif isinstance(prompt, str):
        special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
        ids = tokenizer.encode(prompt, add_special_tokens=special)
    else:
        ids = list(prompt)
    if not ids:
        raise UserError("the prompt is empty: expected at least one token")
    return ids


def _check_prompt(model: nn.Module, length: int) -> None:
    limit = Target(model).context_length
    if limit is not None and length >= limit:
        raise UserError(f"the prompt has {length} tokens, expected fewer than the model's context of {limit}")


def _held(prompt_cache: list[Any] | None) -> int:
    return max((c.offset for c in prompt_cache or [] if isinstance(getattr(c, "offset", None), int)), default=0)


def _verifier(
    model: nn.Module, drafter: RecurrentDrafter, shape: DraftShape, prompt_cache: list[Any] | None
) -> tuple[Verifier | None, str]:
    """The model's verifier, or None and why drafts cannot be used."""
    verifier = verifier_of(model)
    if verifier.capability == NONE:
        return None, verifier.reason
    check_pair(verifier.target, drafter)
    shape.check(drafter.config.vocab_size)
    if prompt_cache is not None and not KVCache.takes(prompt_cache):
        return None, "the prompt cache is of a kind that cannot take back rejected tokens"
    return verifier, ""


def _plainly(
    target: Target,
    ids: mx.array,
    prompt_cache: list[Any] | None,
    choose: Chooser,
    max_tokens: int,
    step_size: int,
    progress: Progress | None,
) -> Generator[Produced]:
    cache = make_prompt_cache(target.model) if prompt_cache is None else prompt_cache
    return autoregressive(target, ids, cache, choose, max_tokens, step_size, progress)


def _drafting(
    verifier: Verifier,
    drafter: RecurrentDrafter,
    ids: mx.array,
    prompt_cache: list[Any] | None,
    shape: DraftShape,
    choose: Chooser,
    max_tokens: int,
    step_size: int,
    progress: Progress | None,
) -> Generator[Produced]:
    """Speculative decoding whose rows end up in the caller's cache, exactly those of what was yielded."""
    cache = verifier.make_cache() if prompt_cache is None else KVCache.adopt(prompt_cache)
    held = _held(prompt_cache)
    yielded: list[int] = []
    source = speculative(verifier, drafter, ids, cache, choose, shape, max_tokens, step_size, progress)
    try:
        for produced in source:
            if max_tokens >= 0:
                del produced.tokens[max_tokens - len(yielded) :]
            # Token by token, so that the caller can stop between any two.
            for i, token in enumerate(produced.tokens):
                yielded.append(token)
                part = slice(i, i + 1)
                last = i + 1 == len(produced.tokens)
                yield Produced([token], produced.logits[part], produced.drafted[part], produced.from_prompt, last)
    finally:
        source.close()
        if prompt_cache is not None and cache.length is not None:
            # The last token's row is missing where no later step has read it.
            cache.end_trees(held + ids.shape[1] + max(0, len(yielded) - 1))
            if yielded:
                verifier.target.forward(mx.array([[yielded[-1]]]), cache.layers)
            cache.give_back(prompt_cache)
            mx.eval([c.state for c in prompt_cache])


def _responses(
    source: Generator[Produced],
    tokenizer: TokenizerWrapper,
    prompt_tokens: int,
    max_tokens: int,
    drafting: bool,
    reason: str,
) -> Generator[GenerationResponse]:
    """Turns tokens into text and counts."""
    detokenizer = tokenizer.detokenizer
    statistics, in_step = Statistics(), 0
    tic = time.perf_counter()
    prompt_tps, made = 0.0, 0

    def response(finish_reason: str | None) -> GenerationResponse:
        row = produced.logits[0]
        return GenerationResponse(
            text=detokenizer.last_segment,
            token=token,
            logprobs=row - mx.logsumexp(row),
            from_draft=produced.drafted[0],
            prompt_tokens=prompt_tokens,
            prompt_tps=prompt_tps,
            generation_tokens=made,
            generation_tps=made / max(time.perf_counter() - tic, 1e-9),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish_reason,
            steps=statistics.steps,
            mean_acceptance_length=statistics.mean_acceptance_length,
            acceptance_by_position=statistics.acceptance_by_position,
            method="redrafter" if drafting else "plain",
            reason=reason,
        )

    try:
        for produced in source:
            [token] = produced.tokens
            made += 1
            if produced.from_prompt:
                prompt_tps = prompt_tokens / max(time.perf_counter() - tic, 1e-9)
                tic = time.perf_counter()
            else:
                if in_step == 0:
                    statistics.steps += 1
                else:
                    if in_step > len(statistics.accepted):
                        statistics.accepted.append(0)
                    statistics.accepted[in_step - 1] += 1
                in_step = 0 if produced.last else in_step + 1
            if token in tokenizer.eos_token_ids:
                detokenizer.finalize()
                yield response("stop")
                return
            detokenizer.add_token(token)
            if made == max_tokens:
                detokenizer.finalize()
                yield response("length")
                return
            yield response(None)
    finally:
        source.close()
