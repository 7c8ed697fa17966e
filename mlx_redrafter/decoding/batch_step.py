"""One step for all texts of a batch, and how a text joins it once its prompt has been read.

Knows nothing of when a step is taken.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_redrafter.decoding.batch_text import BatchText
from mlx_redrafter.decoding.logits_processors import process, process_tree
from mlx_redrafter.decoding.options import DecodingOptions, Progress
from mlx_redrafter.decoding.sampling import choose_each
from mlx_redrafter.decoding.step import SpeculativeStep, prefill
from mlx_redrafter.drafting.proposers import Proposer
from mlx_redrafter.target.cache import rows
from mlx_redrafter.target.cache.kv_cache import KVCache, cached, leaves
from mlx_redrafter.target.cache.recurrent import RecurrentCache
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import Verifier


@dataclasses.dataclass
class Arrived:
    """A text whose prompt has been read: a batch of one, before its first step.

    Attributes:
        contexts: (1, m, context_size) the target's hidden states at the end of the prompt.
        root: (1,) int32 its first token.
        logits: (1, vocab_size) that the root was chosen from.
    """

    cache: KVCache
    proposer: Proposer | None
    contexts: mx.array
    root: mx.array
    logits: mx.array


def arriving(verifier: Verifier, proposer: Proposer | None, text: BatchText) -> Generator[None, None, Arrived]:
    """Reads a text's prompt and chooses its first token; yields between chunks."""
    cache, text.prompt_cache = verifier.make_cache(text.prompt_cache), None
    prompt = mx.array([text.prompt], mx.int32)
    text.start = text.length = cached(cache.layers) + prompt.shape[1]
    layers, last = ((), 1) if proposer is None else (proposer.context_layers, proposer.prefix_window)
    total, size = prompt.shape[1], text.options.prefill_step_size
    contexts: list[mx.array] = []
    for read in range(0, total, size):
        if read:
            yield
        options = text.options
        if options.progress is not None:
            options = dataclasses.replace(options, progress=functools.partial(_shifted, options.progress, read, total))
        hidden, logits = prefill(verifier.target, prompt[:, read : read + size], cache.layers, options, layers, last)
        assert hidden is not None
        contexts = [mx.concatenate([*contexts, hidden], axis=1)[:, -last:]]
    [hidden] = contexts
    cache.begin_trees(length=text.length)
    assert cache.length is not None
    if text.options.processors:
        logits = process(text.options.processors, prompt[0], logits)
    root = text.options.choose(logits[:, None], cache.length[:, None])[:, 0]
    if (ranks := verifier.target.ranks) is not None:
        root = ranks.agree(root)
    if proposer is not None:
        proposer.begin(prompt, root, hidden)
    mx.async_eval(root, hidden, *cache.arrays(), *([] if proposer is None else proposer.arrays()))
    return Arrived(cache, proposer, hidden, root, logits)


def _shifted(progress: Progress, before: int, total: int, read: int, _: int) -> None:
    progress(before + read, total)


def in_mlx_lms_form(verifier: Verifier, cache: KVCache) -> list[Any]:
    """The rows of a cache of one text, of which `end_trees` was called, as mlx-lm's own caches."""
    theirs = make_prompt_cache(verifier.target.model)
    cache.give_back(theirs)
    return theirs


class BatchStep(SpeculativeStep):
    """A step of all texts of a batch, each with its own way of choosing.

    Attributes:
        texts: in the order of the batch axis.
    """

    def __init__(self, verifier: Verifier, text: BatchText, arrived: Arrived):
        super().__init__(verifier, arrived.proposer, text.options, arrived.cache, arrived.contexts, arrived.root)
        self._set([text])
        self._states = any(isinstance(layer, RecurrentCache) for layer in leaves(arrived.cache.layers))

    @property
    def can_build_ahead(self) -> bool:
        """Whether a step may be built before the last one has been read.

        Logits processors read tokens on the host. Of recurrent layers only the last step can be taken back.
        """
        return not self._states and not self.options.processors

    def join(self, text: BatchText, arrived: Arrived) -> None:
        """One more text; it takes part from the next step on."""
        rows.join(self.cache, arrived.cache)
        if self.proposer is not None and arrived.proposer is not None:
            self.proposer.join(arrived.proposer)
        self.context = mx.concatenate([self.context, arrived.contexts[:, -1]])
        self.root = mx.concatenate([self.root, arrived.root])
        self._set([*self.texts, text])

    def keep(self, places: list[int]) -> None:
        """Keeps the texts in these places, at least one."""
        index = mx.array(places)
        rows.keep(self.cache, places)
        if self.proposer is not None:
            self.proposer.keep(places)
        self.context, self.root = self.context[index], self.root[index]
        self._set([self.texts[place] for place in places])

    def _set(self, texts: list[BatchText]) -> None:
        """These texts from now on, each with its own way of choosing; processors are asked for by `process`."""
        self.texts = texts
        processors = [processor for text in texts for processor in text.options.processors]
        self.options = DecodingOptions(
            functools.partial(choose_each, [t.options.choose for t in texts]), -1, processors
        )

    def cache_of(self, text: BatchText) -> list[Any]:
        """mlx-lm caches of all tokens of a text but its last; what was read beyond them is taken back."""
        alone = rows.taken_out(self.cache, self.texts.index(text), text.known)
        return in_mlx_lms_form(self.verifier, alone)

    def process(self, tree: CandidateTree, logits: mx.array) -> mx.array:
        rows = [logits[place : place + 1] for place in range(len(self.texts))]
        return mx.concatenate([self._processed(place, tree, row) for place, row in enumerate(rows)])

    def _processed(self, place: int, tree: CandidateTree, logits: mx.array) -> mx.array:
        """A text's logits (1, 1 + N, vocab) after its processors; one of them that fails ends this text alone."""
        text = self.texts[place]
        if not text.options.processors:
            return logits
        history = mx.array(text.prompt + text.tokens[:-1], mx.int32)
        mine = dataclasses.replace(tree, tokens=tree.tokens[place : place + 1], parents=tree.parents[place : place + 1])
        try:
            return process_tree(text.options.processors, history, mine, logits)
        except Exception as error:  # whatever a caller's function raises
            text.fail(error)
            return logits
