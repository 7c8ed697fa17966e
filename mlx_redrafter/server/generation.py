"""The queue and the thread that generates: mlx_lm's, with our loop in it, and nothing that ends it.

Knows nothing of HTTP.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import threading
from collections.abc import Callable, Generator, Iterator
from queue import Empty, Queue
from typing import Any

import numpy as np
from mlx_lm.server import GenerationArguments, ResponseGenerator

from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.server import seam
from mlx_redrafter.server.answers import GONE, Answer, HungUp, answer_to, logger
from mlx_redrafter.server.batches.generator import BatchGenerator
from mlx_redrafter.server.caches.memory import PromptCaches
from mlx_redrafter.server.limits import Limits
from mlx_redrafter.server.metrics import Metrics
from mlx_redrafter.server.provider import Provider
from mlx_redrafter.server.requests import Arguments, Request
from mlx_redrafter.server.text_stream import recorded, text_stream
from mlx_redrafter.system import threads
from mlx_redrafter.text.sessions.recorder import Recorder

POLL = 0.2  # seconds between two looks at whether the client is still there


class GenerationThread(ResponseGenerator):
    """Generates for requests together where they can be batched, else for one after the other.

    Args:
        limits: of queue and context.
        recorder: keeps what is asked and answered, where that is wanted.

    Attributes:
        loads_others: whether requests may name models that are not loaded.
        started: done when the models of the command line are loaded; raises what went wrong.
        metrics: counted as requests end.
    """

    loads_others = True
    model_provider: Provider
    prompt_cache: PromptCaches

    def __init__(
        self, provider: Provider, prompt_cache: PromptCaches, limits: Limits, recorder: Recorder | None = None
    ):
        self.limits, self.recorder, self.started = limits, recorder, concurrent.futures.Future[None]()
        self.metrics = Metrics(self.waiting, prompt_cache)
        self._open = set[Request]()
        self._lock = threading.RLock()
        self._asked: Arguments | None = None  # of the request that was tokenised last
        self._batch: BatchGenerator | None = None
        super().__init__(provider, prompt_cache)
        self._time_budget: Any = range(1)  # steps between two looks at the queue; mlx_lm's takes half a second

    def _run_generate(self) -> None:
        try:
            self.model_provider.load_default()
            self._open_cache()
        except Exception as error:
            self.started.set_exception(error)
            return
        self.started.set_result(None)
        cache = self.prompt_cache  # mlx_lm's loop gives its own reference up
        while not self._stop:
            try:
                with seam.batching(self._new_batch):
                    self._generate()
            except Exception as error:  # outside of what mlx_lm watches over
                logger.error("the generation thread goes on after an error", exc_info=error)
                with self._lock:
                    for request in self._open:
                        if request.taken_up:
                            request.responses.put(error)
                            request.begun.set()
            if self._batch is not None:
                self._batch.close()
                self._batch = None
        cache.close()

    def _open_cache(self) -> None:
        provider = self.model_provider
        self.prompt_cache.open(provider.model_key, provider.model)

    def _next_request(self, timeout: float | None = None) -> Any:
        taken = super()._next_request(timeout)
        if taken is not None:
            taken[1].taken_up = True
        elif timeout is not None:  # nobody's text is being written
            self.prompt_cache.write_one()
        return taken

    def stop_and_join(self) -> None:
        with self._lock:
            for request in self._open:
                self._leave(request)
        self._end()
        self.join()

    def _end(self) -> None:
        """Lets the thread come to its end."""
        self._stop = True

    def _leave(self, request: Request) -> None:
        """Lets the generation of a request end; nobody waits for its answer any more."""
        request.cancelled.set()

    def join(self) -> None:
        threads.join(self._generation_thread)

    def waiting(self) -> int:
        """Requests whose turn has not come yet."""
        with self._lock:
            return sum(not request.begun.is_set() for request in self._open)

    def generate(
        self, request: Any, generation_args: Any, progress_callback: Callable[[int, int], None] | None = None
    ) -> tuple[Any, Iterator[Any]]:
        """Queues a request; as mlx_lm's, in an HTTP thread.

        Returns:
            what is known when its turn has come, and its responses.

        Raises:
            Answer: what to tell the client instead.
        """
        if not self.generation_available():
            raise Answer(503, "the server is stopping")
        with self._lock:
            if self.waiting() >= self.limits.queue:
                raise Answer(429, f"{self.limits.queue} requests are waiting already", retry_after=5)
            self._open.add(request)
        responses = request.responses
        seed = int(np.random.default_rng().integers(2**32)) if generation_args.seed is None else generation_args.seed
        arguments = Arguments(**vars(generation_args) | {"seed": seed, "request": request})
        self.requests.put((responses, request, arguments))
        context = self._await(request, responses)
        while not request.begun.wait(POLL):  # one of a batch may have to wait for room
            self._look(request)
        return context, self._responses(request, responses, progress_callback or (lambda read, total: None))

    @contextlib.contextmanager
    def attending(self, request: Request) -> Iterator[None]:
        """While it lasts, somebody waits for the answer to a request."""
        try:
            yield
        finally:
            self._leave(request)
            with self._lock:
                self._open.discard(request)
            self.metrics.count_text(len(request.tokens), request.first_seconds, request.age, request.last)

    def _responses(
        self, request: Request, responses: Queue[Any], progress: Callable[[int, int], None]
    ) -> Iterator[Any]:
        while (response := self._await(request, responses)) is not None:
            if isinstance(response, tuple):
                progress(*response)
                continue
            request.taken += 1
            if request.texts:
                response.text = request.texts.popleft()
            if response.finish_reason == "stop":
                # mlx_lm's handler drops the text of a response that says so, and takes it for granted where none does.
                response.finish_reason = None
            yield response

    def _await(self, request: Request, responses: Queue[Any]) -> Any:
        """The next thing that the generation thread says of a request. Raises Answer."""
        while True:
            if request.is_time_to_look(POLL):
                self._look(request)
            try:
                found = responses.get(timeout=POLL)
            except Empty:
                continue
            if isinstance(found, Exception):
                raise answer_to(found)
            return found

    def _look(self, request: Request) -> None:
        """Raises Answer where waiting on is of no use."""
        if request.hung_up():
            raise Answer(GONE, "the client hung up")
        if not request.begun.is_set() and request.age > self.limits.queue_seconds:
            raise Answer(503, f"its turn did not come within {request.age:.0f} s", retry_after=30)
        if not self.generation_available():
            raise Answer(503, "the server is stopping")

    def _serve_single(self, request: Any, stream: Any) -> None:
        responses, ours, args = request
        if ours.cancelled.is_set():
            responses.put(HungUp())
            return
        ours.begun.set()
        self._open_cache()
        with seam.generating(functools.partial(self._text_stream, ours, args)):
            super()._serve_single(request, stream)

    def _text_stream(self, request: Request, args: GenerationArguments, **theirs: Any) -> Generator[Any]:
        source = text_stream(self.model_provider, request, args, self._room(request.tokens), **theirs)
        return self._recorded(source, request, args, bool(theirs.get("logits_processors")))

    def _recorded(
        self, source: Generator[Any], request: Request, args: GenerationArguments, processors: bool
    ) -> Generator[Any]:
        if self.recorder is None:
            return source
        return recorded(source, self.recorder, self.model_provider, request, args, processors)

    def _is_batchable(self, args: Any) -> bool:
        provider, request = self.model_provider, args.request
        if self._batch is None or self._batch.closed:  # mlx_lm asks before it loads; what goes wrong shows when it does
            self._batch = None  # it holds models that may have to go
            with contextlib.suppress(Exception):
                provider.load(args.model.model, args.model.adapter, args.model.draft)
        free = request.constraint is None and request.calls is None
        return provider.is_batchable and free and request.num_draft_tokens is None

    def _new_batch(self, model: Any, *, stream: Any, **sizes: int) -> BatchGenerator:
        self._open_cache()
        self._batch = BatchGenerator(self.model_provider, self._newest, self._recorded, self._room, **sizes)
        return self._batch

    def _newest(self) -> Arguments:
        """Of the request that was tokenised last: mlx_lm's loop inserts it next, and knows no more than its prompt."""
        assert self._asked is not None
        return self._asked

    def _room(self, prompt: list[int]) -> int | None:
        """Tokens that the context has for the answer."""
        limit = self._context
        return None if limit is None else limit - len(prompt)

    @property
    def _context(self) -> int | None:
        """Tokens that prompt and text may have together."""
        limits = (self.limits.context, self.model_provider.target.context_length)
        return min((limit for limit in limits if limit is not None), default=None)

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        found = self._written(tokenizer, request, args)
        self._asked, request.tokens = args, list(found[0])
        self._check(request.tokens, args)
        if request.calls is not None:
            size = self.model_provider.target.vocab_size or len(tokenizer)
            request.constraint = request.calls.constraint(tokenizer, size, thinking=found[3] == "reasoning")
        return found

    def _written(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """A prompt as the model reads it; see mlx_lm's `_tokenize`."""
        if isinstance(request.prompt, list):
            return request.prompt, [request.prompt], ["assistant"], "normal", None
        try:
            return super()._tokenize(tokenizer, request, args)
        except Exception as error:  # templates are programs of their own, and messages the client's
            raise UserError(f"messages or prompt: {one_line(error)}") from error

    def _check(self, tokens: list[int], args: Any) -> None:
        """Raises UserError for what only the model can tell."""
        if not tokens:
            raise UserError("the prompt is empty: expected at least one token")
        if (limit := self._context) is not None and len(tokens) >= limit:
            raise UserError(f"the prompt has {len(tokens)} tokens, expected fewer than the context of {limit}")
        size = self.model_provider.target.vocab_size or 2**31
        for name, ids in (("prompt", tokens), ("logit_bias", args.logits.logit_bias or {})):
            if wrong := [token for token in ids if not 0 <= token < size]:
                raise UserError(f"{name} has the token id {wrong[0]}, expected 0 to {size - 1}")

    def _make_state_machine(self, model_key: Any, tokenizer: Any, stop_words: Any) -> Any:
        # Stop strings are found in the text, see `text_stream`, not where they end on a token's border.
        return super()._make_state_machine(model_key, tokenizer, [])
