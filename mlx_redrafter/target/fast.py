"""Puts a function of ours in the place of one of mx.fast's while one call of a model builds its graph.

Knows nothing of what these functions compute.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx


class Replacement:
    """A function that takes the place of one of mx.fast's.

    Args:
        name: of mx.fast's.
        function: takes the same arguments; whoever calls meanwhile from another thread gets it too.

    Attributes:
        own: mx.fast's.
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name, self.function, self.own = name, function, getattr(mx.fast, name)
        self._lock, self._users = threading.Lock(), 0

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        with self._lock:
            self._users += 1
            setattr(mx.fast, self.name, self.function)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    setattr(mx.fast, self.name, self.own)
