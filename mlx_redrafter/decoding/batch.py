"""Decodes texts together: they join and leave between any two steps, each with its own settings.

Knows nothing of words, nor of what a step costs. Every text is written as though it were
alone: what a row reads depends on its own text, and a seed's noise on seed and position.
Prompts are read in chunks between the steps, so that running texts go on; those of similar length together.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_redrafter.decoding.batch_step import Arrival, Arrived, BatchStep, in_mlx_lms_form
from mlx_redrafter.decoding.batch_text import BatchText, TextStep
from mlx_redrafter.decoding.loop import wait_for
from mlx_redrafter.decoding.planner import BatchPlanner, StepRead
from mlx_redrafter.decoding.step import Produced, Submitted
from mlx_redrafter.drafting.proposers import Proposer
from mlx_redrafter.target.cache import rows
from mlx_redrafter.target.cache.kv_cache import cached
from mlx_redrafter.target.verification import Verifier

PASS = 64  # rows of a prompt that take as long as one more pass over the weights, or less


class Batch:
    """Texts that are decoded together.

    Args:
        verifier: with a capability other than "none".
        proposer_for: makes who drafts for a text.
        planner: says what each step drafts.
        most_texts: that run at once; others wait for their turn.
        chunk: prompt tokens that are read between two steps; at least one prompt goes on.
        most_prompts: that are read to their ends between two steps.

    Attributes:
        running: texts that the next step decodes.
        waiting: texts whose prompts have not been read to the end.
        prompt_seconds: that reading prompts has taken.
    """

    def __init__(
        self,
        verifier: Verifier,
        proposer_for: Callable[[BatchText], Proposer],
        planner: BatchPlanner,
        most_texts: int = 32,
        chunk: int = 2048,
        most_prompts: int = 8,
    ):
        self.verifier, self.proposer_for, self.planner = verifier, proposer_for, planner
        self.most_texts, self.chunk, self.most_prompts = most_texts, chunk, most_prompts
        self.waiting: deque[BatchText] = deque()
        self.prompt_seconds = 0.0
        self._arrival: Arrival | None = None  # of the first one that waits, and others
        self._step: BatchStep | None = None
        self._ahead: tuple[list[BatchText], Submitted] | None = None  # on its way, with the texts it is for

    @property
    def running(self) -> list[BatchText]:
        return [] if self._step is None else self._step.texts

    def __len__(self) -> int:
        return len(self.running) + len(self.waiting)

    def add(self, text: BatchText) -> None:
        """A text joins as soon as there is room and its prompt has been read."""
        self.waiting.append(text)

    def remove(self, text: BatchText) -> None:
        """A text leaves, whatever it was at; nothing happens if it has left."""
        if text in self.waiting:
            text.finish_reason = "removed"
            self.waiting.remove(text)
            if self._arrival is not None and self._arrival.ended:
                self._arrival = None
        elif text in self.running:
            self._leave([text])

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept of the running texts: their KV caches, and what their drafter has of its own."""
        if self._step is None:
            return 0
        return sum(array.nbytes for array in self._step.cache.arrays() + self._step.proposer.arrays())

    def cache_of(self, text: BatchText) -> list[Any] | None:
        """mlx-lm caches of what has been read of a running text: all but the last of its tokens."""
        if self._step is None or text not in self.running:
            return None
        return self._step.cache_of(text)

    def step(self) -> list[TextStep]:
        """Reads on in prompts, decodes one step, and says what each text got of it."""
        begin, reads_prompts = time.perf_counter(), self._reads_prompts
        found = self._read_prompts()
        self.prompt_seconds += time.perf_counter() - begin
        if not self.running:
            return found
        assert self._step is not None
        texts, current = self._ahead or self._submit()
        self._ahead = None
        # Step t brings at least one token to each; t + 1 is only of use to those with whom that is not the last.
        may_go_on = any(text.goes_on_after(1) for text in texts) or len(texts) < len(self.running)
        if self._step.can_build_ahead and may_go_on:
            self._ahead = self._submit()
        counts, tokens, rows_drafted = (wait_for(a) for a in (current.count, current.tokens, current.drafted))
        paths = None if current.path is None else wait_for(current.path)
        parents = None if current.parents is None else wait_for(current.parents)
        reads = []
        for row, text in enumerate(texts):
            if text.error is not None:
                found.append(TextStep(text, None))
            if text.ended:  # failed, or removed while the step was on its way
                continue
            count = counts[row]
            new = tokens[row][: count + 1]
            text.length += count + 1
            reads.append(StepRead(current.plan, new, text.length, most=current.most, follows=text.follows))
            if paths is not None and parents is not None:
                reads[-1].path, reads[-1].parents = paths[row][: len(new)], parents[row]
            new = text.take(new)
            drafted, drafts = [i < count for i in range(len(new))], sum(rows_drafted[row]) - 1
            produced = Produced(new, current.logits[row], drafted, plan=current.plan, drafts=drafts)
            found.append(TextStep(text, produced))
        self._tighten()
        self.planner.learn(reads, timed=not reads_prompts)
        ended = [text for text in self.running if text.ended]
        for text in ended:
            if text.wants_cache and text.error is None:
                text.cache = self._step.cache_of(text)
        self._leave(ended)
        return found

    def _submit(self) -> tuple[list[BatchText], Submitted]:
        step = self._step
        assert step is not None
        follows = [text.follows for text in step.texts]
        plan = self.planner.plan(len(step.texts), max(text.length for text in step.texts), follows)
        if (ranks := self.verifier.target.ranks) is not None:
            plan = ranks.share(plan)
        return list(step.texts), step.submit(plan)

    def _tighten(self) -> None:
        assert self._step is not None
        lengths, more = [text.length for text in self._step.texts], self._more
        self._step.cache.tighten(max(lengths) + more, min(lengths) + more)
        self._step.proposer.tighten(1 + max(lengths) + more)  # and the root, which the cache does not hold

    @property
    def _more(self) -> int:
        """By how much a step that is on its way makes texts longer at most."""
        return 0 if self._ahead is None else 1 + self._ahead[1].most

    def _leave(self, texts: list[BatchText]) -> None:
        for text in texts:
            text.finish_reason = text.finish_reason or "removed"
        if not texts or self._step is None:
            return
        places = [place for place, text in enumerate(self._step.texts) if not text.ended]
        if places:
            self._step.keep(places, max(self._step.texts[place].length for place in places) + self._more)
        else:
            self._step = self._ahead = None
        mx.clear_cache()

    @property
    def _reads_prompts(self) -> bool:
        return self._arrival is not None or (bool(self.waiting) and len(self.running) < self.most_texts)

    def _read_prompts(self) -> list[TextStep]:
        """Reads on in the prompts of texts that there is room for; those read to the end join."""
        found: list[TextStep] = []
        left, prompts = self.chunk, self.most_prompts
        while left > 0 and prompts > 0 and self._reads_prompts:
            if self._arrival is None:
                self._arrival = self._next_arrival(prompts)
            arrival = self._arrival
            left -= arrival.read()
            arrived = arrival.arrived() if arrival.done else None
            for text in arrival.failed:
                self.waiting.remove(text)
                found.append(TextStep(text, None))
            arrival.failed = []
            if arrival.done or arrival.ended:
                self._arrival = None
                prompts -= len(arrival.texts)
            if arrived is not None:
                for text in arrived.texts:
                    self.waiting.remove(text)
                found += self._join(arrived)
        return found

    def _next_arrival(self, most: int) -> Arrival:
        """The first prompt that waits, with others whose padding takes less than passes of their own would."""
        room = min(most, self.most_texts - len(self.running))
        first, *others = self.waiting
        texts, empty = [first], self.verifier.make_cache()
        for text in others if _begins(first) else ():
            if len(texts) >= room:
                break
            lengths = [len(each.prompt) for each in (*texts, text)]
            padding = max(lengths) * len(lengths) - sum(lengths)
            if padding <= PASS * len(texts) and _begins(text) and rows.can_pad(empty, max(lengths)):
                texts.append(text)
        return Arrival(self.verifier, texts, [self.proposer_for(text) for text in texts])

    def _join(self, arrived: Arrived) -> list[TextStep]:
        found = []
        if arrived.logits is not None:  # of one text
            [text] = arrived.texts
            text.take(wait_for(arrived.root))
            found = [TextStep(text, Produced(list(text.tokens), arrived.logits, [False], from_prompt=True))]
            if text.ended:
                if text.wants_cache:
                    arrived.cache.end_trees(text.known)
                    text.cache = in_mlx_lms_form(self.verifier, arrived.cache)
                return found
        for text in arrived.texts:
            text.follows = self.planner.follow([*text.before, *text.prompt, *text.tokens])
        if self._step is None:
            self._step = BatchStep(self.verifier, arrived)
        else:
            self._step.join(arrived)
        return found


def _begins(text: BatchText) -> bool:
    """Whether a text has no cache to go on from, and a prompt to read before its first step."""
    return len(text.prompt) > 1 and not cached(text.prompt_cache or [])
