"""Writes texts for many prompts together, with mlx-lm's interface and one more argument, the drafter.

Knows nothing of commands and servers.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import wired_limit
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.decoding.batch import Batch
from mlx_redrafter.decoding.batch_text import STOP, BatchText
from mlx_redrafter.decoding.logits_processors import LogitsProcessor
from mlx_redrafter.decoding.loop import TURNS
from mlx_redrafter.decoding.sampling import Chooser, draft_temperature, from_sampler, greedy
from mlx_redrafter.decoding.step import DecodingOptions, Produced
from mlx_redrafter.drafting.kinds import Drafter, proposer_for
from mlx_redrafter.drafting.lookup import LookupProposer
from mlx_redrafter.drafting.proposers import Proposer
from mlx_redrafter.drafting.shape import AUTO, OFF, DraftShape
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.cache.kv_cache import cached
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.verification import NONE, Verifier
from mlx_redrafter.text.generate import check_prompt, what_to_draft
from mlx_redrafter.text.prompts import Prompt, encode
from mlx_redrafter.tuning.batch_controller import batch_planner
from mlx_redrafter.tuning.session import verifier_for


@dataclasses.dataclass
class BatchStats:
    """Figures of a batch under mlx-lm's names; times in seconds, memory in GB.

    Attributes:
        steps: of a text, all texts together.
        mean_acceptance_length: tokens per step and text; 1.0 without drafts.
    """

    prompt_tokens: int = 0
    prompt_time: float = 0.0
    generation_tokens: int = 0
    generation_time: float = 0.0
    peak_memory: float = 0.0
    steps: int = 0
    mean_acceptance_length: float = 1.0

    @property
    def prompt_tps(self) -> float:
        return self.prompt_tokens / self.prompt_time if self.prompt_time else 0.0

    @property
    def generation_tps(self) -> float:
        return self.generation_tokens / self.generation_time if self.generation_time else 0.0


@dataclasses.dataclass
class BatchResponse:
    """What `batch_generate` returns; the fields are mlx-lm's.

    Attributes:
        texts: one per prompt, in their order.
        stats: of all texts together.
        caches: of each text, mlx-lm caches of the prompt and all its tokens; None unless asked for.
        token_ids: of each text, without the token that ended it; None unless asked for.
        logprobs: of each of these tokens, among what it was chosen from; None unless asked for.
    """

    texts: list[str]
    stats: BatchStats
    caches: list[list[Any]] | None = None
    token_ids: list[list[int]] | None = None
    logprobs: list[list[float]] | None = None


def batch_generate(
    model: nn.Module,
    tokenizer: TokenizerWrapper | Any,
    prompts: Sequence[Prompt],
    prompt_caches: Sequence[list[Any]] | None = None,
    max_tokens: int | Sequence[int] = 128,
    verbose: bool = False,
    return_prompt_caches: bool = False,
    return_token_ids: bool = False,
    return_logprobs: bool = False,
    *,
    drafter: Drafter | None = None,
    sampler: Callable[[mx.array], mx.array] | None = None,
    chooser: Chooser | Sequence[Chooser] | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    shape: DraftShape | str = AUTO,
    lookup: str | None = None,
    completion_batch_size: int = 32,
    prefill_step_size: int = 2048,
) -> BatchResponse:
    """Writes a text for each prompt, many at a time, drafting where a drafter is given.

    Every text is the one that `generate` writes for its prompt with the same settings; float32
    makes that exact. Texts join as others end, and prompts are read between the steps.

    Args:
        model, tokenizer, drafter, sampler: as for `stream_generate`.
        prompts: each as for `stream_generate`.
        prompt_caches: mlx-lm caches to go on from, one list per prompt; they stay as they are.
        max_tokens: of every text, or of each.
        verbose: print how many are done, and the figures.
        return_prompt_caches, return_token_ids, return_logprobs: what to return besides texts and figures.
        chooser: as for `stream_generate`, or one per prompt: each with a seed of its own.
        logits_processors: for every text. With them, and with recurrent layers, every step waits for the one before.
        shape: how much every step drafts; "auto" goes by how many texts run, what steps cost here and what is accepted.
        lookup: as for `stream_generate`; every text is looked up in itself. With a fixed shape, not "off" means always.
        completion_batch_size: texts at once.
        prefill_step_size: prompt tokens read between two steps.

    Raises:
        UserError: a prompt or a value that is wrong, or a model whose texts cannot be decoded together.
    """
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer)
    if sampler is not None and chooser is not None:
        raise UserError("sampler and chooser were both given, expected one")
    if completion_batch_size < 1:
        raise UserError(f"completion_batch_size is {completion_batch_size}, expected 1 or more")
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise UserError(f"prompts is a {type(prompts).__name__}, expected a list of prompts")
    count = len(prompts)
    limits = [max_tokens] * count if isinstance(max_tokens, int) else list(max_tokens)
    every = chooser if callable(chooser) else from_sampler(sampler) if sampler is not None else greedy
    choosers = list(chooser) if isinstance(chooser, Sequence) else [every] * count
    caches = [None] * count if prompt_caches is None else copy.deepcopy(list(prompt_caches))
    for name, values in (("max_tokens", limits), ("chooser", choosers), ("prompt_caches", caches)):
        if len(values) != count:
            raise UserError(f"{name} has {len(values)} entries, expected one for each of the {count} prompts")
    fixed, lookup = what_to_draft(drafter, shape, lookup)
    texts = []
    with TURNS:
        target, encoded = Target.of(model), [encode(tokenizer, prompt) for prompt in prompts]
        if target.ranks is not None:  # as for one text
            encoded = target.ranks.share(encoded)
        for ids, limit, choose, cache in zip(encoded, limits, choosers, caches, strict=True):
            check_prompt(target, ids, cached(cache or []))
            options = DecodingOptions(
                choose,
                limit,
                tuple(logits_processors or ()),
                prefill_step_size=prefill_step_size,
                keep_logits=return_logprobs,
            )
            texts.append(BatchText(ids, options, tokenizer.eos_token_ids.__contains__, cache, return_prompt_caches))
        verifier, kept = verifier_for(model, drafter), None
        if verifier.capability == NONE:
            raise UserError(f"this model's texts cannot be decoded together: {verifier.reason}")
        for cache in caches:
            _check_cache(model, cache)
        if fixed is not None and drafter is not None:
            fixed.check(drafter.config.scored)
        planner, kept = batch_planner(verifier, drafter, fixed, lookup)
    batch = Batch(verifier, proposers(verifier, drafter, lookup), planner, completion_batch_size, prefill_step_size)
    found, stats = _run(model, batch, texts, return_logprobs, verbose)
    if kept is not None:
        kept.save()
    tokens = [text.tokens[:-1] if text.finish_reason == STOP else text.tokens for text in texts]
    response = BatchResponse([tokenizer.decode(ids) for ids in tokens], stats)
    if return_prompt_caches:
        with TURNS:
            response.caches = [_with_last(verifier, text) for text in texts]
    if return_token_ids:
        response.token_ids = tokens
    if return_logprobs:
        response.logprobs = [row[: len(ids)] for row, ids in zip(found, tokens)]
    if verbose:
        print(f"[batch_generate] Prompt: {stats.prompt_tokens} tokens, {stats.prompt_tps:.3f} tokens-per-sec")
        print(
            f"[batch_generate] Generation: {stats.generation_tokens} tokens, {stats.generation_tps:.3f} tokens-per-sec,"
            f" {stats.mean_acceptance_length:.2f} tokens per step"
        )
        print(f"[batch_generate] Peak memory: {stats.peak_memory:.3f} GB")
    return response


def _run(
    model: nn.Module, batch: Batch, texts: list[BatchText], logprobs: bool, verbose: bool
) -> tuple[list[list[float]], BatchStats]:
    """Decodes all texts; log-probabilities of their tokens, where asked for, and figures."""
    found: dict[BatchText, list[float]] = {text: [] for text in texts}
    stats, done, begin = BatchStats(prompt_tokens=sum(len(text.prompt) for text in texts)), 0, time.perf_counter()
    stepped = 0  # tokens that steps brought
    for text in texts:
        batch.add(text)
    with wired_limit(model):
        while len(batch):
            with TURNS:
                parts = batch.step()
            for part in parts:
                if part.produced is None:
                    assert part.text.error is not None
                    raise part.text.error
                if not part.produced.from_prompt:
                    stats.steps, stepped = stats.steps + 1, stepped + len(part.produced.tokens)
                if logprobs:
                    found[part.text] += _logprobs(part.produced)
                if part.text.ended:
                    done += 1
                    if verbose:
                        print(f"[batch_generate] Finished processing {done}/{len(texts)} ...", end="\r")
    if verbose:
        print(f"[batch_generate] Finished processing {done}/{len(texts)}")
    stats.generation_tokens = sum(len(text.tokens) for text in texts)
    stats.prompt_time = batch.prompt_seconds
    stats.generation_time = time.perf_counter() - begin - batch.prompt_seconds
    stats.peak_memory = mx.get_peak_memory() / 1e9
    if stats.steps:
        stats.mean_acceptance_length = stepped / stats.steps
    return list(found.values()), stats


def proposers(verifier: Verifier, drafter: Drafter | None, lookup: str = OFF) -> Callable[[BatchText], Proposer]:
    """Makes who drafts for a text of a batch."""

    def make(text: BatchText) -> Proposer:
        read = text.prompt[: max(1, len(text.prompt) - 1)]  # the last one is the root
        known, temperature = [*text.before, *read], draft_temperature(text.options.choose)
        inner = proposer_for(drafter, verifier.target.embed, temperature, known)
        return inner if lookup == OFF else LookupProposer(inner, None, text.before)

    return make


def _check_cache(model: nn.Module, cache: list[Any] | None) -> None:
    """Raises UserError for caches of another kind than the model's own, which the others of a batch have."""
    if cache is None:
        return
    own = [type(layer).__name__ for layer in make_prompt_cache(model)]
    given = [type(layer).__name__ for layer in cache]
    if len(given) != len(own):
        raise UserError(f"prompt_caches has {len(given)} layers, expected {len(own)}")
    if given != own:
        names = [", ".join(dict.fromkeys(kinds)) for kinds in (given, own)]
        raise UserError(f"prompt_caches has {names[0]}, expected {names[1]}")


def _with_last(verifier: Verifier, text: BatchText) -> list[Any]:
    """A text's caches with its last token, which no step has read."""
    assert text.cache is not None
    verifier.target.forward(mx.array([text.tokens[-1:]]), text.cache)
    mx.eval([layer.state for layer in text.cache])
    return text.cache


def _logprobs(produced: Produced) -> list[float]:
    """Of each token among the logits that it was chosen from."""
    rows = produced.logits[: len(produced.tokens)]
    chosen = mx.take_along_axis(rows, mx.array(produced.tokens)[:, None], axis=1)[:, 0]
    values: Any = (chosen - mx.logsumexp(rows, axis=-1)).tolist()
    return values
