"""Keeps things to one user at a time, and waits for the end of threads that have used MLX.

Knows nothing of what they did.
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from mlx_redrafter.errors import UserError

_PROC = pathlib.Path("/proc/self/task")


def join(thread: threading.Thread) -> None:
    """Waits until a thread is gone, with all that MLX keeps for it.

    Before Python 3.13 a joined thread may still be taking down the functions that MLX has compiled in it, for
    which it needs the interpreter: where that is being shut down, the process aborts.
    """
    thread.join()
    if sys.version_info >= (3, 13):
        return
    if not _PROC.exists():
        time.sleep(0.2)
        return
    while (_PROC / str(thread.native_id)).exists():
        time.sleep(0.001)


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
