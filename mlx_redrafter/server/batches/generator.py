"""Writes the texts of several requests together, with the interface of mlx_lm's BatchGenerator.

A request that is there alone is written by the loop for one text, and goes over to the batch
engine when another one comes. Knows nothing of HTTP.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mlx_lm.generate import wired_limit
from mlx_lm.models.cache import make_prompt_cache

from mlx_redrafter.decoding.batch import Batch
from mlx_redrafter.decoding.loop import TURNS, in_turns
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.shape import AUTO, OFF
from mlx_redrafter.server.batches.row import Dress, Response, Row, empty
from mlx_redrafter.server.provider import Provider
from mlx_redrafter.server.requests import Arguments
from mlx_redrafter.server.text_stream import asks_for_logprobs, with_budget
from mlx_redrafter.target.cache.kv_cache import refused
from mlx_redrafter.text.batches.generate import proposers
from mlx_redrafter.text.generate import steps_of, what_to_draft
from mlx_redrafter.tuning.batch_controller import batch_planner
from mlx_redrafter.tuning.session import verifier_for


class BatchGenerator:
    """What mlx_lm's generation loop takes for its own.

    Args:
        provider: with a target that can verify drafts, and a drafter that can be batched, or none.
        asked: what the request asks for whose prompt is inserted.
        dress: see `Row`.
        room: tokens that the context has for the answer to a prompt; None for no limit.
        completion_batch_size: texts at once.
        prefill_batch_size: prompts read to their ends between two steps.
        prefill_step_size: prompt tokens read between two steps.

    Attributes:
        closed: whether mlx_lm's loop has done with it.
    """

    def __init__(
        self,
        provider: Provider,
        asked: Callable[[], Arguments],
        dress: Dress,
        room: Callable[[list[int]], int | None],
        *,
        completion_batch_size: int,
        prefill_batch_size: int,
        prefill_step_size: int,
    ):
        self._provider, self._asked, self._dress, self._room = provider, asked, dress, room
        self._sizes = completion_batch_size, prefill_step_size, prefill_batch_size
        self._rows: dict[int, Row] = {}
        self._ended: list[Response] = []  # of those that ended when a request came
        self._made, self.closed = 0, False
        self._open = contextlib.ExitStack()
        self._open.enter_context(wired_limit(provider.model))
        shape = provider.shape_for(None) if provider.drafter is not None else None
        with TURNS:
            self._verifier = verifier_for(provider.model, provider.drafter)
            fixed, self._lookup = what_to_draft(provider.drafter, shape or AUTO, provider.lookup)
            planned = batch_planner(self._verifier, provider.drafter, fixed, self._lookup)
        self._planner, self._session = planned
        self._batch = self._new_batch()

    def _new_batch(self) -> Batch:
        who = proposers(self._verifier, self._provider.drafter, self._lookup)
        return Batch(self._verifier, who, self._planner, *self._sizes)

    def insert_segments(
        self,
        segments: list[list[list[int]]],
        max_tokens: list[int],
        caches: list[list[Any] | None],
        logits_processors: list[list[Any]],
        **_: Any,
    ) -> list[int]:
        """Takes one request; mlx_lm's samplers and stop sequences do not see drafts, and ours take their place."""
        [parts], [limit], [cache], [processors] = segments, max_tokens, caches, logits_processors
        args, uid = self._asked(), self._made
        self._made += 1
        room = self._room(args.request.tokens)
        limit = limit if room is None else min(limit, room)
        try:
            tokenizer = self._provider.tokenizer
            processors = with_budget(processors, args.request, tokenizer)
            options = DecodingOptions(
                max_tokens=limit,
                processors=processors,
                prefill_step_size=self._sizes[1],
                keep_logits=asks_for_logprobs(args),
            )
            prompt = [token for part in parts for token in part]
            cache = make_prompt_cache(self._provider.model) if cache is None else cache
            row = Row(uid, args, tokenizer, prompt, cache, options, self._dress)
            if self._rows and not refused(cache):
                self._ended += self._bring_together()
                self._join(row)
            else:
                self._begin(row)
            self._rows[uid] = row
        except Exception as error:  # mlx_lm's loop would end with it
            _tell(args, error)
            self._ended.append(empty(uid, args))
        return [uid]

    def _begin(self, row: Row) -> None:
        """The loop for one text, as in `stream_generate`."""
        provider, options = self._provider, row.options
        fixed, lookup = what_to_draft(provider.drafter, provider.shape_for(None), provider.lookup)
        options = dataclasses.replace(options, processors=row.processors_after(row.cached))
        with TURNS:
            source, row.method, row.reason = steps_of(
                provider.target, provider.drafter, row.prompt, options, fixed, lookup, row.cache, row.cached
            )
        row.alone = in_turns(source)
        row.request.begun.set()

    def _join(self, row: Row) -> None:
        drafter, alone = self._provider.drafter, "plain" if self._lookup == OFF else "lookup"
        row.method, row.reason = alone if drafter is None else drafter.method, self._verifier.reason
        self._batch.add(row.move())

    def _bring_together(self) -> list[Response]:
        """Hands those that are written alone over to the engine; others may fail at it."""
        failed = []
        for row in [row for row in self._rows.values() if row.alone is not None and row.can_move]:
            try:
                self._batch.add(row.move())
            except Exception as error:
                failed.append(self._fail(row, error))
        return failed

    def next(self) -> tuple[list[Any], list[Response]]:
        """One step of every text. Rows tell of progress in prompts themselves, so there are no prompt responses."""
        found, self._ended = self._ended, []
        for row in [row for row in self._rows.values() if row.request.cancelled.is_set()]:
            found.append(self._end(row, empty(row.uid, row.args)))
        alone = [row for row in self._rows.values() if row.alone is not None]
        self._batch.most_texts = max(1, self._sizes[0] - len(alone))
        for row in alone:
            found += self._watched(row, self._step_alone(row))
        if len(self._batch):
            found += self._step_together()
        return [], found

    def _step_alone(self, row: Row) -> Iterator[Response]:
        assert row.alone is not None
        for produced in row.alone:
            yield from row.take(produced)
            if produced.last:
                return

    def _step_together(self) -> list[Response]:
        rows = {row.text: row for row in self._rows.values() if row.text is not None}
        try:
            with TURNS:
                steps = self._batch.step()
        except Exception as error:  # of no one text
            self._batch = self._new_batch()
            return [self._fail(row, error) for row in rows.values()]
        found = list[Response]()
        for step in steps:
            row = rows[step.text]
            if step.produced is None:
                assert step.text.error is not None
                found.append(self._fail(row, step.text.error))
            else:
                found += self._watched(row, row.take(step.produced))
        return found

    def _watched(self, row: Row, responses: Iterable[Response]) -> Iterator[Response]:
        """The responses of a row up to its last one; an error is the last one of its row."""
        try:
            for response in responses:
                if response.finish_reason is not None:
                    yield self._end(row, response)
                    return
                yield response
        except Exception as error:
            yield self._fail(row, error)

    def _end(self, row: Row, response: Response) -> Response:
        cache: list[Any] | None = row.cache
        if row.text is not None:
            cache = row.text.cache or self._batch.cache_of(row.text)
        self.remove([row.uid])
        if self._session is not None:
            self._session.save()
        return row.end(response, cache)

    def _fail(self, row: Row, error: Exception) -> Response:
        self.remove([row.uid])
        _tell(row.args, error)
        return row.end(empty(row.uid, row.args), None)

    def remove(self, uids: Iterable[int]) -> None:
        """Ends rows, of those that have not ended."""
        for row in [self._rows.pop(uid) for uid in uids if uid in self._rows]:
            if row.text is not None:
                self._batch.remove(row.text)
            elif row.alone is not None:
                row.alone.close()

    def extract_cache(self, uids: Iterable[int]) -> dict[int, Any]:
        """Of no row: mlx_lm's loop asks at the ends of parts of a prompt, of which `next` tells none."""
        return {}

    @property
    def prompt_cache_nbytes(self) -> int:
        caches = [row.cache for row in self._rows.values()]
        caches += [text.prompt_cache or [] for text in self._batch.waiting]
        return self._batch.nbytes + sum(layer.nbytes for cache in caches for layer in cache)

    def close(self) -> None:
        """Nothing is written any more."""
        self.remove(list(self._rows))
        self._open.close()
        self.closed = True


def _tell(args: Arguments, error: Exception) -> None:
    args.request.responses.put(error)
    args.request.begun.set()
