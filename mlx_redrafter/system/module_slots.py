"""Finds where modules hang in a model, and puts stand-ins in their place for one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import mlx.nn as nn


class Slipped:
    """Stand-ins that are in a model only while a block of code runs.

    Args:
        stand_ins: each with the slot that it is put into.
    """

    def __init__(self, stand_ins: list[tuple[Slot, Any]]):
        self._stand_ins = stand_ins

    def __enter__(self) -> None:
        for slot, stand_in in self._stand_ins:
            put(slot, stand_in)

    def __exit__(self, *_: Any) -> None:
        for slot, _stand_in in reversed(self._stand_ins):
            put(slot, slot.module)


def put(slot: Slot, value: Any) -> None:
    """Hangs something into a slot. A module is a dictionary of what it has, whose order stays as it was."""
    slot.owner[slot.name] = value


@dataclasses.dataclass
class Slot:
    """Where a module hangs in a model.

    Attributes:
        path: names and list indices from the model down, with dots.
        owner: the module or list that has it, under `name`.
    """

    path: str
    owner: Any
    name: Any
    module: nn.Module

    @property
    def in_place(self) -> bool:
        """Whether the module still hangs there."""
        return self.owner[self.name] is self.module


def slots(module: nn.Module, path: str = "") -> Iterator[Slot]:
    """Where every module below one hangs, parents first."""
    for name in list(module.children()):  # of which lists are copies
        yield from _slots_of(module, name, module[name], f"{path}{name}")


def _slots_of(owner: Any, name: Any, child: Any, path: str) -> Iterator[Slot]:
    if isinstance(child, nn.Module):
        yield Slot(path, owner, name, child)
        yield from slots(child, path + ".")
    elif isinstance(child, (list, dict)):
        for key, item in list(child.items() if isinstance(child, dict) else enumerate(child)):
            yield from _slots_of(child, key, item, f"{path}.{key}")
