"""Generates the text of one request: our loop in the place of mlx_lm's, with what the request asks for.

Knows nothing of queues and HTTP.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.server import GenerationArguments

from mlx_redrafter.constraints.thinking import thinking_budget
from mlx_redrafter.decoding.logits_processors import LogitsProcessor
from mlx_redrafter.decoding.sampling import Chooser, position_keyed
from mlx_redrafter.drafting.shape import OFF
from mlx_redrafter.errors import UserError
from mlx_redrafter.server import seam
from mlx_redrafter.server.answers import HungUp
from mlx_redrafter.server.provider import Provider
from mlx_redrafter.server.requests import Request
from mlx_redrafter.text.generate import stream_generate
from mlx_redrafter.text.sessions.recorder import NEUTRAL, Recorder, settings_of
from mlx_redrafter.text.stop_strings import StopStrings


def text_stream(
    provider: Provider,
    request: Request,
    args: GenerationArguments,
    room: int | None,
    *,
    prompt: list[int],
    max_tokens: int,
    input_embeddings: Any,
    prompt_progress_callback: Callable[[int, int], None],
    **theirs: Any,
) -> Generator[Any]:
    """What mlx_lm.server calls for the responses of one text.

    Args:
        room: tokens that the context has for the text; None for no limit.
        prompt: what of the prompt the cache does not hold.
        input_embeddings: with them, the text is mlx_lm's.
        theirs: the other arguments of mlx_lm's `stream_generate`.

    Raises:
        HungUp: the client has gone while the prompt was read.
        UserError: see `stream_generate`.
    """

    def progress(read: int, total: int) -> None:
        request.look()
        if request.cancelled.is_set():
            raise HungUp
        prompt_progress_callback(read, total)

    theirs |= {
        "prompt": prompt,
        "max_tokens": max_tokens if room is None else min(max_tokens, room),
        "prompt_progress_callback": progress,
    }
    if input_embeddings is None:
        source = ours(provider, request, args, **theirs)
    else:
        if request.constraint is not None:
            raise UserError("response_format or tools: found with images, which mlx_lm reads, expected text alone")
        source = seam.theirs(input_embeddings=input_embeddings, **theirs)
    return answering(source, request, args, theirs["tokenizer"])


def answering(source: Generator[Any], request: Request, args: GenerationArguments, tokenizer: Any) -> Generator[Any]:
    """The responses of a text up to where the request ends it, with what it asks for."""
    stops = StopStrings(args.stop_words)
    with contextlib.closing(source):
        for response in source:
            ended = response.finish_reason is not None
            response.text, stopped = stops.take(response.text, last=ended)
            if stopped:
                response.finish_reason, request.stopped_by = "stop", stops.found
            if asks_for_logprobs(args):
                request.logprobs.append(described(response, args.top_logprobs, tokenizer))
            else:
                response.logprobs = _UNASKED
            request.note(response)
            yield response
            if stopped or ended or request.cancelled.is_set():
                return


def asks_for_logprobs(args: GenerationArguments) -> bool:
    return bool(args.logprobs) or args.top_logprobs > 0


def recorded(
    source: Generator[Any],
    recorder: Recorder,
    provider: Provider,
    request: Request,
    args: GenerationArguments,
    processors: bool,
) -> Generator[Any]:
    """The same responses; then their text is recorded. `processors`: whether logits were changed before sampling."""
    said: list[str] = []
    reason = None
    try:
        with contextlib.closing(source):
            for response in source:
                said.append(response.text)
                reason = response.finish_reason
                yield response
    finally:  # mlx_lm leaves a stream that has said enough
        if said:
            model, tokenizer, flags = provider.model, provider.tokenizer, provider.cli_args
            asked: Any = request.prompt
            if request.request_type == "chat" and tokenizer.has_chat_template:
                asked = request.messages
            elif not isinstance(asked, str) or request.request_type == "chat":
                asked = tokenizer.decode(request.tokens, skip_special_tokens=True)
            changed = {
                "processors": processors,
                "response_format": request.constraint is not None,
                "thinking_budget": request.thinking_budget,
                "stop": request.stopped_by,
                "tools": bool(request.tools),
                "adapter_path": provider.model_key[1],
                "template": args.chat_template_kwargs or flags.chat_template_args or flags.chat_template,
            }
            sampling = {name: getattr(args.sampling, name) for name in NEUTRAL}
            settings = settings_of(args.sampling.temperature, changed, **sampling)
            recorder.note(model, tokenizer, provider.name, asked, "".join(said), settings, reason == "stop")


def ours(
    provider: Provider,
    request: Request,
    args: GenerationArguments,
    *,
    prompt: list[int],
    logits_processors: Sequence[LogitsProcessor],
    **options: Any,
) -> Generator[Any]:
    """The same from our loop."""
    for name in ("stream", "sampler", "draft_model", "num_draft_tokens"):  # what takes their place is in the request
        options.pop(name)
    plain = request.num_draft_tokens == 0
    constraint = request.constraint
    if plain and constraint is not None:
        constraint = dataclasses.replace(constraint, jump_ahead=False)
    cached, tokenizer = request.tokens[: len(request.tokens) - len(prompt)], options["tokenizer"]
    processors = with_budget(logits_processors, request, tokenizer)
    return stream_generate(
        drafter=None if plain else provider.drafter,
        prompt=prompt,
        chooser=chooser(args, tokenizer),
        constraint=constraint,
        logits_processors=[after(cached, processor) for processor in processors],
        shape=provider.shape_for(request.num_draft_tokens or None),
        lookup=OFF if plain else provider.lookup,
        cached_tokens=cached,
        **options,
    )


def with_budget(theirs: Sequence[LogitsProcessor], request: Request, tokenizer: Any) -> list[LogitsProcessor]:
    """mlx_lm's processors, and one that ends thoughts where a request limits them."""
    # What fulfils a schema from its first token on has no thoughts.
    thinks = tokenizer.has_thinking and (request.constraint is None or request.calls is not None)
    if request.thinking_budget is None or not thinks:
        return list(theirs)
    thought = tokenizer.think_start_tokens, tokenizer.think_end_tokens
    return [*theirs, thinking_budget(*thought, request.thinking_budget)]


def described(response: Any, top: int, tokenizer: Any) -> dict[str, Any]:
    """What OpenAI says of a token and of the `top` most probable ones in its place; ids are mlx_lm's addition."""
    row = response.logprobs
    before = tokenizer.encode("a", add_special_tokens=False)  # alone, some would lose the space that they begin with
    start = tokenizer.decode(before)

    def one(token: int) -> dict[str, Any]:
        text = tokenizer.decode([*before, token]).removeprefix(start)
        part = "\ufffd" in text  # of a letter of several tokens
        return {
            "token": text,
            "logprob": row[token].item(),
            "bytes": None if part else list(text.encode()),
            "id": token,
        }

    best: Any = mx.argsort(-row)[: max(0, top)].tolist()
    return one(response.token) | {"top_logprobs": [one(token) for token in best]}


def chooser(args: GenerationArguments, tokenizer: Any) -> Chooser:
    """How the target chooses: as `generate` does."""
    sampling = args.sampling
    assert args.seed is not None  # the queue gives each request one
    return position_keyed(
        sampling.temperature,
        seed=args.seed,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        top_k=sampling.top_k,
        xtc_probability=sampling.xtc_probability,
        xtc_threshold=sampling.xtc_threshold,
        xtc_special_tokens=(*tokenizer.encode("\n"), *tokenizer.eos_token_ids),
    )


def after(cached: list[int], processor: LogitsProcessor) -> LogitsProcessor:
    """The same processor, which sees the cached part of the prompt, too: a text must not depend on what was cached."""
    if not cached:
        return processor
    before = mx.array(cached, mx.int32)
    return lambda tokens, logits: processor(mx.concatenate([before, tokens]), logits)


class _Unasked:
    """Stands for log-probabilities that nobody asked for: reading the real ones would wait for the device."""

    def __getitem__(self, token: int) -> np.float32:
        return np.float32(0)


_UNASKED = _Unasked()
