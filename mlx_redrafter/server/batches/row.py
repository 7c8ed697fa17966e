"""One request of a batch: what is left to write of it, and what its client is told.

Knows nothing of the other requests.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationBatch
from mlx_lm.models.cache import KVCache, trim_prompt_cache

from mlx_redrafter.decoding.batch_text import BatchText
from mlx_redrafter.decoding.step import DecodingOptions, Produced
from mlx_redrafter.server.answers import HungUp
from mlx_redrafter.server.requests import Arguments, Request
from mlx_redrafter.server.text_stream import after, answering, chooser
from mlx_redrafter.text.responses import responses
from mlx_redrafter.text.stop_strings import StopStrings

Response = GenerationBatch.Response
Dress = Callable[[Generator[Any], Request, Arguments, bool], Generator[Any]]


class Row:
    """One request.

    Args:
        uid: mlx_lm's number of it.
        args: what it asks for.
        tokenizer: the target's.
        prompt: the tokens that the cache does not hold, at least one.
        cache: mlx-lm caches of those before; of no one else.
        options: but how tokens are chosen and who follows the reading.
        dress: makes of responses what the server makes of every text's.

    Attributes:
        tokens: of the answer so far.
        alone: the steps of a loop for one text, where such a loop writes it.
        text: what the engine writes, where that does.
        method, reason: as in `GenerationResponse`.
    """

    def __init__(
        self,
        uid: int,
        args: Arguments,
        tokenizer: Any,
        prompt: list[int],
        cache: list[Any],
        options: DecodingOptions,
        dress: Dress,
    ):
        self.uid, self.args, self.request, self.cache = uid, args, args.request, cache
        self.prompt, self.tokens = prompt, list[int]()
        self.options = dataclasses.replace(options, choose=chooser(args, tokenizer), progress=self._progress)
        self.alone: Generator[Produced] | None = None
        self.text: BatchText | None = None
        self.method, self.reason = "plain", ""
        self._tokenizer, self._dress, self._began = tokenizer, dress, time.perf_counter()
        self._fed = collections.deque[Produced]()
        self._pieces: Generator[Any] | None = None

    @property
    def cached(self) -> list[int]:
        """The tokens that the cache held at first."""
        return self.request.tokens[: len(self.request.tokens) - len(self.prompt)]

    @property
    def can_move(self) -> bool:
        """Whether a text that has begun alone can go on in the engine, which reads its last token again."""
        return not self.tokens or all(type(layer) is KVCache for layer in self.cache)

    def processors_after(self, before: list[int]) -> list[Any]:
        return [after(before, processor) for processor in self.options.processors]

    def move(self) -> BatchText:
        """The text for the engine; a loop that has begun it leaves it."""
        before, prompt, made = self.cached, self.prompt, len(self.tokens)
        if self.alone is not None:
            self.alone.close()
            self.alone = None
        if made:
            trim_prompt_cache(self.cache, 1)
            before, prompt = [*self.request.tokens, *self.tokens[:-1]], self.tokens[-1:]
        options = dataclasses.replace(
            self.options,
            max_tokens=self.options.max_tokens - made,
            processors=self.processors_after(before),
            progress=None if made else self.options.progress,
        )
        self.text = BatchText(prompt, options, self._ends(), self.cache, wants_cache=True, before=before)
        self.cache = []
        return self.text

    def _ends(self) -> Callable[[int], bool]:
        """Says of every token whether the text ends with it, so that no step goes on behind a stop string."""
        ids = self._tokenizer.eos_token_ids
        if not any(self.args.stop_words):
            return ids.__contains__
        detokenizer, stops = self._tokenizer.detokenizer, StopStrings(self.args.stop_words)

        def stopped(token: int) -> bool:
            detokenizer.add_token(token)
            return stops.take(detokenizer.last_segment)[1]

        for token in self.tokens:
            stopped(token)
        return lambda token: token in ids or stopped(token)

    def take(self, produced: Produced) -> Iterator[Response]:
        """What mlx_lm's loop is told of the tokens of a step, or of a part of one; the last one may end the text."""
        produced.from_prompt &= not self.tokens
        for part in produced.one_by_one():
            self._fed.append(part)
            if self._pieces is None:
                self._pieces = self._answer()
            [token] = part.tokens
            self.tokens.append(token)
            if (piece := next(self._pieces, None)) is not None:  # else nobody waits for it any more
                self.request.texts.append(piece.text)
                yield Response(self.uid, token, piece.logprobs, piece.finish_reason, None, None)

    def _answer(self) -> Generator[Any]:
        def fed() -> Generator[Produced]:
            while True:
                yield self._fed.popleft()

        limit = self.options.max_tokens
        source = responses(fed(), self._tokenizer, len(self.prompt), limit, (), self.method, self.reason, self._began)
        found = answering(source, self.request, self.args, self._tokenizer)
        return self._dress(found, self.request, self.args, bool(self.options.processors))

    def end(self, response: Response, cache: list[Any] | None) -> Response:
        """The last response, with what the cache holds, which is None where nothing is left of it.

        A loop for one text has read every token that it gave out, the engine all but the last.
        """
        if self._pieces is not None:
            self._pieces.close()
        tokens = [*self.request.tokens, *self.tokens]
        if self.text is not None:
            tokens = tokens[: self.text.known]
        response.prompt_cache, response.all_tokens = (cache, tokens) if cache and self.tokens else ([], [])
        return response

    def _progress(self, read: int, total: int) -> None:
        self.request.begun.set()
        self.request.look()
        if self.request.cancelled.is_set():
            raise HungUp
        self.request.responses.put((read, total))


def empty(uid: int, args: Arguments) -> Response:
    """A last response without a token, for a text that ends before its time; mlx_lm's loop reads its logprobs."""
    return Response(uid, 0, mx.zeros(max(1, args.top_logprobs)), "stop", [], [])
