"""Makes a recurrent layer's mixer read a step's rows again without reading its weights again.

Knows nothing of acceptance. While a tree is read, a stand-in for each mixer (the module that
reads and writes the layer's state) remembers the call and what the mixer's linear layers
returned. Replaying the call gives the linear layers' outputs back, so no weight matrix is read
twice, and of the rest only the state is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList
from mlx_lm.tuner.lora import LoRALinear

from mlx_redrafter.system.module_slots import Slot, StandIn, slots, standing_in
from mlx_redrafter.target.cache.attention import TreeRows
from mlx_redrafter.target.cache.recurrent import RecurrentCache
from mlx_redrafter.target.tree import TreeFrame


class MixerStandIn(StandIn):
    """Stands in for a mixer: remembers the call where it is part of a verification."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self._linears = [
            slot
            for slot in slots(module)
            if isinstance(slot.module, (nn.Linear, nn.QuantizedLinear, LoRALinear))
            and not isinstance(slot.owner, LoRALinear)
        ]

    def call(self, *args: Any, **kwargs: Any) -> Any:
        layer = _recurrent_among((*args, *kwargs.values()))
        if layer is None or layer.frame is None or layer.step is None:
            return self.module(*args, **kwargs)
        recorders = [(slot, _Recording(slot.module)) for slot in self._linears]
        layer.step.calls.append(functools.partial(_replay, self.module, args, kwargs, recorders, layer.frame.rows))
        with standing_in(recorders):
            return self.module(*args, **kwargs)


def _replay(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    recorders: list[tuple[Slot, _Recording]],
    rows: int,
    frame: TreeFrame,
    change: Callable[[Any], Any],
    row: int | None,
) -> None:
    """Makes a mixer's call, which read so many rows, again with changed arguments: one row, or all where it is None.

    Its output is of no use, its cache's state is. The frame is for attention beside the mixer, and recorders know
    what its linear layers returned.
    """
    args = tuple(change(value) for value in args)
    kwargs = {name: change(value) for name, value in kwargs.items()}
    attention = [c for value in (*args, *kwargs.values()) for c in _caches(value) if isinstance(c, TreeRows)]
    for cache in attention:
        cache.frame = frame
    try:
        with standing_in([(slot, _Playback(slot.module, seen.outputs, rows, row)) for slot, seen in recorders]):
            module(*args, **kwargs)
    finally:
        for cache in attention:
            cache.frame = None


class _Recording(StandIn):
    """Stands in for a linear layer and keeps what it returns, call by call."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.outputs: list[mx.array] = []

    def call(self, x: mx.array) -> mx.array:
        self.outputs.append(self.module(x))
        return self.outputs[-1]


class _Playback(StandIn):
    """Stands in for a linear layer and returns what it returned before, or one row of it."""

    def __init__(self, module: nn.Module, outputs: list[mx.array], rows: int, row: int | None):
        super().__init__(module)
        self._outputs, self._rows, self._row = list(outputs), rows, row

    def call(self, x: mx.array) -> mx.array:
        read = self._rows if self._row is None else 1
        output = self._outputs.pop(0) if self._outputs else None
        # Where it does not read the same rows in the same form, it reads them for itself.
        if output is None or output.ndim != 3 or x.ndim != 3 or x.shape[1] != read or output.shape[1] != self._rows:
            return self.module(x)
        return output if self._row is None else output[:, self._row : self._row + 1]


class _Listener(StandIn):
    """Notes a module's path if it is given a recurrent cache and hands it to no module below."""

    def __init__(self, slot: Slot, found: list[str]):
        super().__init__(slot.module)
        self._path, self._found = slot.path, found

    def call(self, *args: Any, **kwargs: Any) -> Any:
        before = len(self._found)
        output = self.module(*args, **kwargs)
        if len(self._found) == before and _recurrent_among((*args, *kwargs.values())) is not None:
            self._found.append(self._path)
        return output


def find_mixers(model: nn.Module, layers: list[Any]) -> tuple[str, ...]:
    """Paths of the modules that read and write a recurrent state, found by one call of the model.

    Args:
        layers: what `KVCache.layers` has for it, empty; one token is read into them.
    """
    found: list[str] = []
    with standing_in([(slot, _Listener(slot, found)) for slot in slots(model)]):
        model(mx.zeros((1, 1), mx.int32), cache=layers)
    return tuple(dict.fromkeys(found))


def _caches(value: Any) -> list[Any]:
    if isinstance(value, CacheList):
        return [c for inner in value.caches for c in _caches(inner)]
    return [value] if isinstance(value, (RecurrentCache, TreeRows)) else []


def _recurrent_among(values: tuple[Any, ...]) -> RecurrentCache | None:
    """The recurrent cache among a call's arguments, alone or in a list of caches for one layer."""
    for value in values:
        for cache in _caches(value):
            if isinstance(cache, RecurrentCache):
                return cache
    return None
