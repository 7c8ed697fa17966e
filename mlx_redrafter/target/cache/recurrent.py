"""Layers with a state instead of rows: how they get back to where the accepted rows end.

A recurrent layer (Mamba, gated delta nets, RWKV, short convolutions) keeps what it has
read in a few arrays, and rejected tokens cannot be cut off them. So the state from before
the step is kept, and after acceptance the layer's mixer reads the same rows again as far
as they were accepted. It costs little: what the mixer's linear layers made of the rows is
remembered, so no weight matrix is read twice, and of the rest only the state is computed.

How far a mixer reads is a number on the device. Where it knows mlx-lm's `lengths` (rows
beyond a length are padding, as in a batch) it reads all rows at once and stops there.
Elsewhere it reads row by row, and one of the states is chosen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, CacheList
from mlx_lm.tuner.lora import LoRALinear

from mlx_redrafter.system.module_slots import Slipped, Slot, slots
from mlx_redrafter.target.cache.attention import TreeFrame, TreeRows

LENGTHS, ROWS = "lengths", "rows"


class StateCache(ArraysCache):
    """One layer's state arrays, and what is needed to take rows back.

    Attributes:
        replay: LENGTHS or ROWS, how mixers read again.
        cache: the state arrays; None before anything was read.
        frame: of the verification that is going on.
        step: the last verification, as this layer saw it.
    """

    cache: list[Any]
    lengths: Any

    def __init__(self, size: int, replay: str):
        super().__init__(size)
        self.replay = replay
        self.frame: TreeFrame | None = None
        self.step: Step | None = None

    def make_mask(self, N: int) -> Any:
        return super().make_mask(N) if self.frame is None or self.replay == ROWS else self.frame.every_row

    def prepare(self, frame: TreeFrame) -> None:  # type: ignore[override]  # mlx-lm's is for batches
        self.frame = frame
        self.step = Step(self, frame, list(self.cache))

    def begin(self) -> None:
        """Nothing changes: a state is where it is."""

    def end(self, length: int) -> None:
        self.step = None

    def arrays(self) -> list[mx.array]:
        return [array for array in self.cache if array is not None]


@dataclasses.dataclass
class Step:
    """One verification as one layer saw it.

    Attributes:
        before: the layer's state arrays before it.
        calls: of the layer's mixers.
    """

    layer: StateCache
    frame: TreeFrame
    before: list[Any]
    calls: list[MixerCall] = dataclasses.field(default_factory=list)

    def keep(self, rows: mx.array) -> None:
        """Brings the layer to where it is after the first rows[b] rows, (B,) at least 1, on the device."""
        layer = self.layer
        layer.cache = list(self.before)
        if layer.replay == LENGTHS:
            mask = mx.arange(self.frame.rows) < rows[:, None]
            for call in self.calls:
                layer.lengths = rows + 0  # a mixer counts it down in place
                call.again(self._frame_at(0), functools.partial(self._value, mask=mask))
            layer.lengths = None
            return
        states = []
        for row in range(self.frame.rows):
            for call in self.calls:
                call.again(self._frame_at(row), functools.partial(self._value, row=row), row)
            states.append(list(layer.cache))
        chosen = states[0]
        for row, later in enumerate(states[1:], 1):
            chosen = [mx.where(_beside(rows > row, new), new, old) for old, new in zip(chosen, later)]
        layer.cache = chosen

    def forget(self) -> None:
        """Brings the layer to where it was before all rows."""
        self.layer.cache = list(self.before)

    def _frame_at(self, row: int) -> TreeFrame:
        return dataclasses.replace(self.frame, length=self.frame.length + row, replaying=True)

    def _value(self, value: Any, row: int | None = None, mask: mx.array | None = None) -> Any:
        """What to call a mixer with in place of a value that it was called with; of one row, or of all."""
        if value is self.frame.every_row:
            return mask
        if self.frame.made(value):
            return None  # a mask of the attention beside it, whose output is of no use
        if row is None or not isinstance(value, mx.array):
            return value
        if value is self.frame.offset:
            return value + row
        if value.ndim > 1 and value.shape[1] == self.frame.rows:
            return value[:, row : row + 1]
        return value


def _beside(flags: mx.array, array: mx.array) -> mx.array:
    """(B,) flags with as many axes as an array (B, ...)."""
    return flags.reshape(-1, *[1] * (array.ndim - 1))


@dataclasses.dataclass
class MixerCall:
    """A mixer's call, and what its linear layers made of the rows."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tape: Tape

    def again(self, frame: TreeFrame, change: Callable[[Any], Any], row: int | None = None) -> None:
        """Calls the mixer with changed arguments; its output is of no use, its cache's state is."""
        args = [change(value) for value in self.args]
        kwargs = {name: change(value) for name, value in self.kwargs.items()}
        others = [c for value in (*args, *kwargs.values()) for c in _caches(value) if isinstance(c, TreeRows)]
        for cache in others:
            cache.frame = frame
        try:
            with self.tape.played(row):
                self.module(*args, **kwargs)
        finally:
            for cache in others:
                cache.frame = None


class Mixer:
    """Stands in for a mixer: remembers the call where it is part of a verification."""

    def __init__(self, module: nn.Module):
        self.module = module
        self._linears = _linears(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer = state_among((*args, *kwargs.values()))
        if layer is None or layer.frame is None or layer.step is None:
            return self.module(*args, **kwargs)
        tape = Tape(self._linears, layer.frame.rows)
        layer.step.calls.append(MixerCall(self.module, args, kwargs, tape))
        with tape.recorded():
            return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class Tape:
    """What the linear layers of one mixer returned, in the order of its calls."""

    def __init__(self, linears: list[Slot], rows: int):
        self.rows = rows
        self._linears = linears
        self._outputs: dict[str, list[mx.array]] = {slot.path: [] for slot in linears}

    def recorded(self) -> Slipped:
        """While it lasts, the layers' outputs are remembered."""
        return Slipped([(slot, _Recorded(slot.module, self._outputs[slot.path])) for slot in self._linears])

    def played(self, row: int | None) -> Slipped:
        """While it lasts, the layers return what they did, or one row of it."""
        return Slipped(
            [(slot, _Played(slot.module, self._outputs[slot.path], self.rows, row)) for slot in self._linears]
        )


class _Recorded:
    def __init__(self, module: nn.Module, outputs: list[mx.array]):
        self.module, self._outputs = module, outputs

    def __call__(self, x: mx.array) -> mx.array:
        self._outputs.append(self.module(x))
        return self._outputs[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _Played:
    def __init__(self, module: nn.Module, outputs: list[mx.array], rows: int, row: int | None):
        self.module, self._outputs, self._rows, self._row = module, list(outputs), rows, row

    def __call__(self, x: mx.array) -> mx.array:
        read = self._rows if self._row is None else 1
        output = self._outputs.pop(0) if self._outputs else None
        # Where it does not read the same rows in the same form, it reads them for itself.
        if output is None or output.ndim != 3 or x.ndim != 3 or x.shape[1] != read or output.shape[1] != self._rows:
            return self.module(x)
        return output if self._row is None else output[:, self._row : self._row + 1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class _Listener:
    """Stands in for a module: notes its path if it is given a layer's state and hands it to no module below."""

    def __init__(self, slot: Slot, found: list[str]):
        self._slot, self._found = slot, found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = len(self._found)
        output = self._slot.module(*args, **kwargs)
        if len(self._found) == before and state_among((*args, *kwargs.values())) is not None:
            self._found.append(self._slot.path)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slot.module, name)


def find_mixers(model: nn.Module, layers: list[Any]) -> tuple[str, ...]:
    """Paths of the modules that read and write a layer's state, found by one call of the model.

    Args:
        layers: what `KVCache.layers` has for it, empty; one token is read into them.
    """
    found: list[str] = []
    listeners = [(slot, _Listener(slot, found)) for slot in slots(model)]
    with Slipped(listeners):
        model(mx.zeros((1, 1), mx.int32), cache=layers)
    return tuple(dict.fromkeys(found))


def _linears(mixer: nn.Module) -> list[Slot]:
    return [
        slot
        for slot in slots(mixer)
        if isinstance(slot.module, (nn.Linear, nn.QuantizedLinear, LoRALinear))
        and not isinstance(slot.owner, LoRALinear)
    ]


def _caches(value: Any) -> list[Any]:
    if isinstance(value, CacheList):
        return [c for inner in value.caches for c in _caches(inner)]
    return [value] if isinstance(value, (StateCache, TreeRows)) else []


def state_among(values: tuple[Any, ...]) -> StateCache | None:
    """The layer with a state among a call's arguments, alone or in a list of caches for one layer."""
    for value in values:
        for cache in _caches(value):
            if isinstance(cache, StateCache):
                return cache
    return None
