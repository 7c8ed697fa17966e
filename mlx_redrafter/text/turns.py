"""Lets threads that generate take turns, step by step; knows nothing of what a step is.

While a step is built, stand-ins hang in the model: another thread that used it then would meet them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

from mlx_redrafter.errors import UserError

T = TypeVar("T")


class Turns:
    """A lock for one thread at a time, which may take it again; who waits is served before who comes back."""

    def __init__(self) -> None:
        self._queue, self._lock = threading.RLock(), threading.RLock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            self._lock.acquire()
        else:
            with self._queue:
                self._lock.acquire()
        self._owner, self._depth = threading.get_ident(), self._depth + 1

    def __exit__(self, *_: Any) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
        self._lock.release()


TURNS = Turns()  # of all models: threads share the device, and drafters may be shared, too


def in_turns(steps: Generator[T]) -> Generator[T]:
    """The same items; each is made, and the end reached, while no other thread makes one."""
    try:
        while True:
            with TURNS:
                try:
                    item = next(steps)
                except StopIteration:
                    return
            yield item
    finally:
        with TURNS:
            steps.close()


class InUse:
    """Objects of which only one user at a time may change the contents."""

    def __init__(self) -> None:
        self._ids: set[int] = set()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def alone(self, objects: list[Any], refusal: str) -> Iterator[None]:
        """Raises UserError with this text where one of the objects is in use; else they are while it lasts."""
        ids = {id(thing) for thing in objects}  # `objects` keeps them alive: no id comes to mean another
        with self._lock:
            if ids & self._ids:
                raise UserError(refusal)
            self._ids |= ids
        try:
            yield
        finally:
            with self._lock:
                self._ids -= ids
