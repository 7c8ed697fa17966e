"""Finds where modules hang in a model, and puts stand-ins in their place for one call.

Knows nothing of what the modules compute.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.nn as nn


@dataclasses.dataclass
class Slot:
    """Where a module hangs in a model.

    Attributes:
        path: names and list indices from the model down, with dots.
        owner: the module, list or dictionary that has it, under `name`.
    """

    path: str
    owner: Any
    name: Any
    module: nn.Module


def slots(owner: Any, path: str = "") -> Iterator[Slot]:
    """Where every module below one hangs, parents first."""
    if isinstance(owner, nn.Module):
        items = [(name, owner[name]) for name in owner.children()]  # whose values are copies where they are lists
    else:
        items = list(owner.items() if isinstance(owner, dict) else enumerate(owner))
    for name, child in items:
        where = f"{path}.{name}" if path else str(name)
        if isinstance(child, nn.Module):
            yield Slot(where, owner, name, child)
        if isinstance(child, (nn.Module, list, dict)):
            yield from slots(child, where)


class StandIn:
    """Stands in for a module in the thread that put it there; in others it is called and read as the module is.

    A subclass says in `call` what a call does instead.
    """

    _thread: int | None = None

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.call if self.at_work else self.module)(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @property
    def at_work(self) -> bool:
        """Whether this is the thread that it stands in for."""
        return self._thread == threading.get_ident()

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # type: ignore[override]
        """The module's, for models ask layers for their kind (`isinstance`) before they call them."""
        return type(self.module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@contextlib.contextmanager
def standing_in(stand_ins: Sequence[tuple[Slot, StandIn]]) -> Iterator[None]:
    """While it lasts, each stand-in hangs in its slot, for calls from this thread.

    A module is a dictionary of what it has; the order of that stays as it was.
    """
    try:
        for slot, stand_in in stand_ins:
            stand_in._thread = threading.get_ident()
            slot.owner[slot.name] = stand_in
        yield
    finally:
        for slot, _ in reversed(stand_ins):
            slot.owner[slot.name] = slot.module
