"""Waits for the end of threads that have used MLX. Knows nothing of what they did."""

from __future__ import annotations

import pathlib
import sys
import threading
import time

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
