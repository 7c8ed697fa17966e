"""One step for all texts of a batch, and how a text joins it once its prompt has been read.

Knows nothing of when a step is taken.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_redrafter.decoding.batch_text import BatchText
from mlx_redrafter.decoding.logits_processors import process, process_tree
from mlx_redrafter.decoding.sampling import choose_each
from mlx_redrafter.decoding.step import DecodingOptions, SpeculativeStep
from mlx_redrafter.drafting.proposers import Proposer
from mlx_redrafter.system.device import on_cpu
from mlx_redrafter.target.cache import rows
from mlx_redrafter.target.cache.kv_cache import KVCache, cached, leaves
from mlx_redrafter.target.cache.recurrent import RecurrentCache
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import Verifier


@dataclasses.dataclass
class Arrived:
    """Texts before their first step in the batch: a cache of their own, and what a step begins with.

    Attributes:
        context: (B, context_size) the target's hidden states before the root; zeros where nobody reads them.
        root: (B,) int32 the last token of the prompt, or the one after it.
        logits: (1, vocab_size) that the root was chosen from; None where the prompt ends with it.
    """

    texts: list[BatchText]
    cache: KVCache
    proposer: Proposer
    context: mx.array
    root: mx.array
    logits: mx.array | None = None


class Arrival:
    """Reads the prompts of some texts together, part by part.

    Shorter prompts are padded on the right: no row sees those behind it, and what is behind a text's length
    counts as nothing. The last token of a prompt is left to the texts' first step, which needs no pass of its own.

    Args:
        texts: several where `rows.can_pad` says so; one of any kind.
        proposers: of each.

    Attributes:
        failed: texts that one of their own functions has ended, since this was last emptied.
    """

    def __init__(self, verifier: Verifier, texts: list[BatchText], proposers: list[Proposer]):
        self.verifier, self.texts, self.proposers = verifier, texts, proposers
        self.cache = verifier.make_cache(texts[0].prompt_cache if len(texts) == 1 else None)
        rows.in_small_blocks(self.cache)
        self.failed: list[BatchText] = []
        self._lengths = [max(1, len(text.prompt) - 1) for text in texts]  # that are read here
        self._read = 0
        longest = max(self._lengths)
        padded = [text.prompt[:longest] + [0] * (longest - len(text.prompt)) for text in texts]
        self._tokens = mx.array(padded, mx.int32)
        self._hidden: list[mx.array] = []
        for text in texts:
            text.prompt_cache = None
            text.start = cached(self.cache.layers) + len(text.prompt)

    @property
    def ended(self) -> bool:
        """Whether nobody waits for these prompts any more."""
        return all(text.ended for text in self.texts)

    def read(self) -> int:
        """Reads one part of the prompts, and says how many rows it was."""
        self._tell(self._read)
        batch, total = self._tokens.shape
        size, target = min(text.options.prefill_step_size for text in self.texts), self.verifier.target
        # On a GPU small parts would cost time. Several processes have to take the same, and their weights differ.
        if on_cpu() and target.ranks is None:
            size = min(size, target.rows_at_once)
        size = max(1, size // batch)
        part = self._tokens[:, self._read : self._read + size]
        reads = self.proposers[0]
        hidden, logits = target.forward(part, self.cache.layers, context_layers=reads.context_layers)
        if len(self.texts[0].prompt) == 1:  # nobody else asks for them, and lazy ones hold on to what they are made of
            self._logits = logits
        self._read += part.shape[1]
        if reads.prefix_window:
            assert hidden is not None
            last = reads.prefix_window + total - min(self._lengths)
            self._hidden = [mx.concatenate([*self._hidden, hidden], axis=1)[:, -last:]]
        mx.eval([layer.state for layer in self.cache.layers], self._hidden)
        mx.clear_cache()
        return part.size

    @property
    def done(self) -> bool:
        return self._read == self._tokens.shape[1]

    def arrived(self) -> Arrived | None:
        """The texts that have not ended, once all is read; None where there are none."""
        self._tell(self._read)
        places = [place for place, text in enumerate(self.texts) if not text.ended]
        if not places:
            return None
        for text, read in zip(self.texts, self._lengths):
            text.length = text.start - len(text.prompt) + read
        self.cache.begin_trees(lengths=[text.length for text in self.texts])
        if len(places) < len(self.texts):
            rows.keep(self.cache, places)
        texts = [self.texts[place] for place in places]
        logits, root = None, mx.array([text.prompt[-1] for text in texts], mx.int32)
        if len(texts[0].prompt) == 1:  # there is no context before it to draft from
            logits, options = self._logits[:, -1], texts[0].options
            if options.processors:
                logits = process(options.processors, self._tokens[0], logits)
            assert self.cache.length is not None
            root = options.choose(logits[:, None], self.cache.length[:, None])[:, 0]
            if (ranks := self.verifier.target.ranks) is not None:
                root = ranks.agree(root)
        proposer, context = self._proposer(places, root)
        mx.async_eval(root, context, *self.cache.arrays(), *proposer.arrays())
        return Arrived(texts, self.cache, proposer, context, root, logits)

    def _proposer(self, places: list[int], root: mx.array) -> tuple[Proposer, mx.array]:
        """Who drafts for the texts in these places, and the contexts of the tokens before their roots."""
        target, first = self.verifier.target, self.proposers[places[0]]
        shape = (*self._tokens.shape, target.context_size(first.context_layers))
        unread = mx.broadcast_to(mx.zeros((), target.dtype), shape)  # takes no memory
        [hidden], self._hidden = self._hidden or [unread], []
        before, contexts = self._tokens.shape[1] - hidden.shape[1], []
        for n, place in enumerate(places):
            proposer, length = self.proposers[place], self._lengths[place]
            end = length - before
            mine = hidden[place : place + 1, max(0, end - proposer.prefix_window) : end]
            proposer.begin(self._tokens[place : place + 1, :length], root[n : n + 1], mine)
            contexts.append(hidden[place : place + 1, end - 1])
            if n:
                first.join(proposer)
                mx.eval(first.arrays())  # or as many in a row would be there at once
        return first, mx.concatenate(contexts)

    def _tell(self, read: int) -> None:
        """Calls who follows the reading of a prompt; one that fails ends its text alone."""
        for text in self.texts:
            total = len(text.prompt)
            if text.options.progress is None or text.ended:
                continue
            try:
                text.options.progress(total if read == self._tokens.shape[1] else min(read, total), total)
            except Exception as error:  # whatever a caller's function raises
                text.fail(error)
                self.failed.append(text)


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

    def __init__(self, verifier: Verifier, arrived: Arrived):
        context = arrived.context[:, None]
        super().__init__(verifier, arrived.proposer, DecodingOptions(), arrived.cache, context, arrived.root)
        self._set(arrived.texts)
        self._states = any(isinstance(layer, RecurrentCache) for layer in leaves(arrived.cache.layers))

    @property
    def can_build_ahead(self) -> bool:
        """Whether a step may be built before the last one has been read.

        Logits processors read tokens on the host. Of recurrent layers only the last step can be taken back.
        """
        return not self._states and not self.options.processors

    def join(self, arrived: Arrived) -> None:
        """More texts; they take part from the next step on."""
        rows.join(self.cache, arrived.cache)
        self.proposer.join(arrived.proposer)
        mx.eval(self.proposer.arrays())  # before the caches are put together: not both at once
        self.context = mx.concatenate([self.context, arrived.context])
        self.root = mx.concatenate([self.root, arrived.root])
        self._set([*self.texts, *arrived.texts])

    def keep(self, places: list[int], bound: int) -> None:
        """Keeps the texts in these places, at least one, of which none is longer than the bound."""
        index = mx.array(places)
        rows.keep(self.cache, places, bound)
        self.proposer.keep(places)
        self.context, self.root = self.context[index], self.root[index]
        self._set([self.texts[place] for place in places])

    def _set(self, texts: list[BatchText]) -> None:
        """These texts from now on, each with its own way of choosing; processors are asked for by `process`."""
        self.texts = texts
        processors = [processor for text in texts for processor in text.options.processors]
        self.options = DecodingOptions(
            functools.partial(choose_each, [text.options.choose for text in texts]),
            -1,
            processors,
            keep_logits=any(text.options.keep_logits for text in texts),
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
        history = mx.array((text.prompt + text.tokens)[:-1], mx.int32)
        mine = dataclasses.replace(tree, tokens=tree.tokens[place : place + 1], parents=tree.parents[place : place + 1])
        try:
            return process_tree(text.options.processors, history, mine, logits)
        except Exception as error:  # whatever a caller's function raises
            text.fail(error)
            return logits
