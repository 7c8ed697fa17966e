"""Answers requests in all processes that a target is split over: rank 0 takes them, and says when one is to end.

Each process runs the same loop over the same requests. What an HTTP thread, a clock or one machine's state decides is
rank 0's, and goes to the others at places that all of them pass: before a request is taken, after a step, and while a
prompt is read. Knows nothing of HTTP.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Generator, Iterator
from queue import Queue
from typing import Any

from mlx_lm.server import CompletionRequest, GenerationArguments

from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.server.answers import Answer
from mlx_redrafter.server.caches.shared import SharedPromptCaches
from mlx_redrafter.server.generation import GenerationThread
from mlx_redrafter.server.limits import Limits
from mlx_redrafter.server.provider import Provider
from mlx_redrafter.server.requests import Arguments, Request
from mlx_redrafter.system.ranks import Ranks

OURS = ("num_draft_tokens", "constraint", "calls", "thinking_budget")
REQUEST = (*(field.name for field in dataclasses.fields(CompletionRequest)), *OURS)  # what all know of a request
ARGUMENTS = tuple(field.name for field in dataclasses.fields(GenerationArguments))


class Responses(Queue[Any]):
    """What is said to a request's HTTP thread; an error that is not all processes' is the end of all."""

    def __init__(self, ranks: Ranks):
        super().__init__()
        self._ranks = ranks

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        if isinstance(item, Exception):
            self._ranks.all_failed(f"{type(item).__name__}: {one_line(item)}")
        super().put(item, block, timeout)


class GenerationTogether(GenerationThread):
    """One of several processes that write the same answers; the first one has the queue.

    Args:
        ranks: the processes.
    """

    loads_others = False

    def __init__(self, provider: Provider, prompt_cache: SharedPromptCaches, limits: Limits, ranks: Ranks):
        self.ranks, self._stopping = ranks, False
        # By the order in which they were taken; who writes one holds it.
        self._taken, self._count = weakref.WeakValueDictionary[int, Request](), 0
        super().__init__(provider, prompt_cache, limits)

    def _run_generate(self) -> None:
        self._is_distributed = False  # mlx_lm's own sharing waits in a collective, which keeps a core busy
        super()._run_generate()

    def _generate(self) -> None:
        try:
            super()._generate()
        except Exception as error:  # outside of one request: who knows where the others are
            self.ranks.fail(f"{type(error).__name__}: {one_line(error)}", 1)

    def generate(
        self, request: Any, generation_args: Any, progress_callback: Callable[[int, int], None] | None = None
    ) -> tuple[Any, Iterator[Any]]:
        asked = generation_args.model
        names = self.model_provider.known(asked.model, asked.adapter, asked.draft)
        if names is None:
            raise Answer(404, f"{self.ranks.size} processes serve {self.model_provider.name} alone, and its drafter")
        generation_args.model = dataclasses.replace(asked, model=names[0], draft=names[1])
        request.responses = Responses(self.ranks)
        context, responses = super().generate(request, generation_args, progress_callback)
        context.stop = lambda: self._leave(request)  # mlx_lm's loop would see it in this process alone
        return context, responses

    def _next_request(self, timeout: float | None = None) -> Any:
        taken = super()._next_request(timeout) if self.ranks.first else None
        told = None
        if taken is not None:
            told = _fields(taken[1], REQUEST), _fields(taken[2], ARGUMENTS)
        told, gone, self._stop = self.ranks.share((told, self._gone(), self._stopping))
        self._cancel(gone)
        if told is None:
            return None
        if taken is None:
            request = Request(**told[0], responses=Responses(self.ranks))
            taken = request.responses, request, Arguments(**told[1], request=request)
        taken[1].look = self._hear
        self._taken[self._count], self._count = taken[1], self._count + 1
        return taken

    def _hear(self) -> None:
        """Hears from rank 0 whose answers nobody waits for any more."""
        self._cancel(self.ranks.share(self._gone()))

    def _gone(self) -> list[int]:
        return [number for number, request in self._taken.items() if request.left and not request.cancelled.is_set()]

    def _cancel(self, numbers: list[int]) -> None:
        for number in numbers:
            if (request := self._taken.get(number)) is not None:  # else it has ended
                request.cancelled.set()

    def _share_object(self, obj: Any) -> Any:
        """mlx_lm's loop shares here which texts of a batch end, after every step; ours end by `cancelled`."""
        self._hear()
        return obj

    def _text_stream(self, request: Request, args: GenerationArguments, **theirs: Any) -> Generator[Any]:
        for response in super()._text_stream(request, args, **theirs):
            yield response
            self._hear()

    def _written(self, tokenizer: Any, request: Any, args: Any) -> Any:
        found, problem = None, ""
        if self.ranks.first:  # alone: a template may tell the time
            try:
                found = self._read(tokenizer, request, args)
            except UserError as error:
                problem = str(error)
        found, problem = self.ranks.share((found, problem))
        if problem:
            raise UserError(problem)
        return found

    def _read(self, tokenizer: Any, request: Any, args: Any) -> Any:
        found = super()._written(tokenizer, request, args)
        if found[-1] is not None:
            raise UserError(f"messages: found images, which one process reads, expected text: {self.ranks.size} serve")
        return found

    def _leave(self, request: Request) -> None:
        request.left = True

    def _end(self) -> None:
        self._stopping = True


def _fields(of: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(of, name) for name in names}
