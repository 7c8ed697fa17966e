"""Finds a model's layers in the order in which it runs them, and gives the hidden states behind them.

Knows nothing of what these hidden states are for.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_redrafter.system.module_slots import Slot, StandIn, slots, standing_in

_EPS = 1e-6
_ROWS = 3  # of the call that shows the order: not 1, which a number of streams could be as well


class RawLayers(tuple[int, ...]):
    """Numbers of layers whose hidden states are to be given as the layers return them, the last one's, too."""


class Tap(StandIn):
    """Stands in for a layer and keeps what it returned last.

    Attributes:
        hidden: (B, M, hidden_size); unless `raw`, of unit RMS per row: layers add to what they read, so later ones
            give much more.
    """

    hidden: mx.array | None = None
    raw = False

    def call(self, *args: Any, **kwargs: Any) -> Any:
        output = self.module(*args, **kwargs)
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        while hidden.ndim > 3:  # of several streams (gemma3n) the first, in which the others are brought together
            hidden = hidden[0]
        self.hidden = hidden if self.raw else mx.fast.rms_norm(hidden, None, _EPS)
        return output


class _Listener(Tap):
    """A tap that also notes when its layer is called."""

    def __init__(self, slot: Slot, called: list[_Listener]):
        super().__init__(slot.module)
        self.slot, self._called = slot, called

    def call(self, *args: Any, **kwargs: Any) -> Any:
        output = super().call(*args, **kwargs)
        self._called.append(self)
        return output


def find_layers(model: nn.Module, width: int) -> tuple[list[Slot], str]:
    """Where a model's layers hang, the first one first; or no place, and for people why none can be told.

    Every mlx-lm model has a list `layers`, by which its caches are made. Under which names the
    layers hang, and that they are called in this order, is shown by one call of the model whose
    graph nobody evaluates. Where a model runs all of them several times the last time counts.

    Args:
        width: of the hidden states.
    """
    called: list[_Listener] = []
    try:
        listed = list(model.layers)  # type: ignore[arg-type]
        listeners = [(s, _Listener(s, called)) for s in slots(model) if any(s.module is layer for layer in listed)]
        with standing_in(listeners):
            model(mx.zeros((1, _ROWS), mx.int32), cache=make_prompt_cache(model))
        last = called[-len(listed) :]
        if len(last) < len(listed) or any(tap.module is not layer for tap, layer in zip(last, listed)):
            return [], "its layers are not called one after the other"
        if any(tap.hidden is None or tap.hidden.shape != (1, _ROWS, width) for tap in last):
            return [], "its layers return something else than hidden states"
    except Exception as error:  # whatever a model's own code does with what it was handed
        return [], f"{type(error).__name__} {str(error).partition(chr(10))[0]}".strip()
    return [tap.slot for tap in last], ""
