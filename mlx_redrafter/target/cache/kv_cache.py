"""The cache of all layers: takes a tree's rows behind the committed ones, commits one path, rolls back.

Knows nothing of how one layer keeps its rows (see `attention`, `recurrent`). The committed
length is a device array, so that a step can be built before the one before it has run; the
host only knows bounds, which size the buffers and the part of them that attention reads.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, QuantizedKVCache, RotatingKVCache
from mlx_lm.models.cache import KVCache as PlainKVCache

from mlx_redrafter.errors import UserError
from mlx_redrafter.target.cache.attention import LayerCache, Path, QuantizedLayerCache, WindowCache, with_contents
from mlx_redrafter.target.cache.recurrent import AT_ONCE, RecurrentCache, RecurrentStep
from mlx_redrafter.target.operations import positions_per_row
from mlx_redrafter.target.tree import CandidateTree, TreeFrame


class KVCache:
    """All layers' caches with one committed length.

    Args:
        prompt_cache: mlx-lm caches to go on from; their buffers are shared until `give_back`.
        replay: how recurrent layers take rows back; see `recurrent`.

    Attributes:
        layers: what the model gets as its `cache` argument.
        length: committed rows, (B,) int32 on the device, once `begin_trees` was called.
        bound: an upper bound of the committed length that the host knows.
        low: no length is below it, nor will it be after rows were taken back.
        steps: the last ones, by the length before them, as the recurrent layers saw them.
    """

    def __init__(self, prompt_cache: list[Any], replay: str = AT_ONCE):
        self.layers = [_adopted(cache, replay) for cache in prompt_cache]
        self.length: mx.array | None = None
        self.bound = 0
        self._plain = False  # layers are as mlx-lm's own caches, and their length is exact
        self.low = 0
        self._most = 0  # rows that one step commits at most
        # A loop is at most two steps ahead of the tokens that it has given out.
        self.steps: collections.deque[tuple[mx.array, list[RecurrentStep]]] = collections.deque(maxlen=3)

    def give_back(self, prompt_cache: list[Any]) -> None:
        """Leaves the rows in the list of mlx-lm caches that was adopted; it may get quantised ones."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer, QuantizedLayerCache) and not hasattr(prompt_cache[i], "bits"):
                prompt_cache[i] = QuantizedKVCache(layer.group_size, layer.bits)
            for theirs, ours in zip(leaves([prompt_cache[i]]), leaves([layer])):
                if isinstance(ours, RecurrentCache):
                    theirs.cache = list(ours.cache)
                else:
                    with_contents(theirs, ours)

    def begin_trees(self, batch_size: int = 1, length: int | None = None, lengths: Sequence[int] | None = None) -> None:
        """Hands the prompt's length to the device; the prompt's rows must be there.

        Args:
            length: of the prompt; needed where no layer counts (they all have states).
            lengths: of each text's, where they differ: the rows behind them count as nothing.
        """
        known = list(lengths or [cached(self.layers) or length or 0] * batch_size)
        self.bound, self.low = max(known), min(known)
        self.length = mx.array(known, mx.int32)
        self._plain = False
        for cache in leaves(self.layers):
            if isinstance(cache, WindowCache):
                cache.in_order()

    @property
    def can_rewind(self) -> bool:
        """Whether rows can be cut off the end: not of a window that has moved on, nor of a recurrent state."""
        return all(isinstance(cache, (LayerCache, QuantizedLayerCache)) for cache in leaves(self.layers))

    def plain_rows(self, length: int | None) -> bool:
        """Lets single rows go through mlx-lm's own code until the next tree, so that they cost what they cost there.

        The number of plain rows is known beforehand, so steps may be built ahead again.
        Caches that cannot `rewind` read a single row as a tree of one, and nothing changes.

        Args:
            length: the exact committed length (batch size 1); rows beyond it are cut off.
                None while a step is on its way that decides it.

        Returns:
            False where the length is needed: build the plain step when the last one has been read.
        """
        if (self._plain and length is None) or not self.can_rewind:
            return True
        if length is None:
            return False
        for cache in leaves(self.layers):
            cache.flush()
            cache.offset = length
        self.length = mx.array([length], mx.int32)
        self.bound, self._plain = length, True
        return True

    @contextlib.contextmanager
    def reading(self, tree: CandidateTree, chain: bool, split_rows: bool = False) -> Iterator[None]:
        """While it lasts, the layers take a tree's rows behind the committed ones, and rope knows their positions.

        Args:
            chain: rows stand in consecutive positions, and the model is told only the first.
            split_rows: the model gets each row as a batch entry of its own.
        """
        if self._plain and tree.rows == 1:
            yield
            return
        if self._plain:
            self.begin_trees()
        assert self.length is not None
        frame = TreeFrame(self.length, tree.depths, tree.ancestors, chain, self.bound, self.low, split_rows)
        for cache in leaves(self.layers):
            cache.prepare(frame)
        try:
            with positions_per_row(frame.offset):
                yield
        finally:
            for cache in leaves(self.layers):
                cache.frame = None

    def commit(self, path: mx.array | None, count: mx.array, most: int) -> None:
        """Keeps the root's row and `count` rows of one path; the length grows by 1 + count.

        Args:
            path: (B, D) tree rows in order, root excluded; None where they already lie in
                order (a chain). Entries beyond `count` are moved too and never looked at.
            count: (B,) accepted draft tokens.
            most: the largest value that count can have.
        """
        assert self.length is not None
        steps, kept = [], None if path is None else Path(path, self.length)
        for cache in leaves(self.layers):
            if isinstance(cache, RecurrentCache):
                assert cache.step is not None
                cache.step.keep(1 + count)
                steps.append(cache.step)
            elif kept is not None:
                cache.move(kept)
        self.steps.append((self.length, steps))
        self._most = max(self._most, 1 + most)
        self.length = self.length + 1 + count
        self.bound += 1 + most

    def tighten(self, bound: int, least: int | None = None) -> None:
        """Tells the host's bound once a step's count has been read, and that of the shortest text where they differ."""
        self.bound = bound
        # Of the rows below the bound, one step may not have happened yet, and those of one
        # more may be taken back where a loop is left between two of its tokens.
        self.low = max(self.low, (bound if least is None else least) - 2 * self._most)

    def end_trees(self, length: int) -> None:
        """Back to plain mlx-lm caches of `length` rows, as after a prompt of that length."""
        self.take_back(length)
        for cache in leaves(self.layers):
            cache.end(length)
        self.steps.clear()
        self.length, self._plain = None, False

    def take_back(self, length: int, text: int = 0) -> None:
        """Brings recurrent layers to where one text was after `length` tokens."""
        for before, steps in reversed(self.steps):
            if not steps:
                return
            at: Any = before[text].item()
            rows = length - at
            for step in steps:
                if rows > 0:
                    step.keep(mx.full(before.shape, rows, mx.int32))
                else:
                    step.forget()
            if rows >= 0:
                return

    def arrays(self) -> list[mx.array]:
        """Every buffer and the length, to submit or to wait for: a loop may go on in another thread."""
        lengths = [] if self.length is None else [self.length]
        return [array for cache in leaves(self.layers) for array in cache.arrays()] + lengths


def leaves(layers: list[Any]) -> list[Any]:
    """The caches in a list that may have lists of caches for one layer in it."""
    return [leaf for c in layers for leaf in (leaves(list(c.caches)) if isinstance(c, CacheList) else [c])]


def refused(prompt_cache: list[Any]) -> str:
    """Names of the kinds of mlx-lm caches that rejected tokens cannot be taken back from; empty if there are none."""
    kinds = (PlainKVCache, QuantizedKVCache, RotatingKVCache, ArraysCache)
    return ", ".join(
        sorted({type(c).__name__ for c in leaves(prompt_cache) if type(c) not in kinds or getattr(c, "keep", None)})
    )


def _adopted(cache: Any, replay: str) -> Any:
    if isinstance(cache, CacheList):
        return CacheList(*(_adopted(inner, replay) for inner in cache.caches))
    if isinstance(cache, ArraysCache):
        state = RecurrentCache(len(cache.cache), replay)
        state.cache = list(cache.cache)
        return state
    if isinstance(cache, RotatingKVCache):
        return with_contents(WindowCache(cache.max_size), cache)
    if isinstance(cache, QuantizedKVCache):
        return with_contents(QuantizedLayerCache(cache.group_size, cache.bits), cache)
    return with_contents(LayerCache(), cache)


def quantize_layers(layers: list[Any], group_size: int, bits: int) -> None:
    """Quantises mlx-lm caches, or ours, in place in their list.

    Raises:
        UserError: a head width that the group size does not divide, or a kind of cache
            that mlx-lm cannot quantise.
    """
    for i, layer in enumerate(layers):
        if hasattr(layer, "to_quantized"):
            for width in {layer.keys.shape[-1], layer.values.shape[-1]}:
                if width % group_size:
                    raise UserError(f"--kv-group-size is {group_size}, which does not divide the head width {width}")
            try:
                layers[i] = layer.to_quantized(group_size=group_size, bits=bits)
            except (ValueError, NotImplementedError) as error:
                raise UserError(f"--kv-bits {bits}: mlx-lm cannot quantise {type(layer).__name__} ({error})") from error


def cached(layers: list[Any]) -> int:
    """Tokens that mlx-lm caches hold."""
    return max((int(c.offset) for c in leaves(layers) if isinstance(getattr(c, "offset", None), int)), default=0)
