"""Runs a call on a stack of its own, for code below Python that goes as deep as its input.

Knows nothing of grammars.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
STACK = 128 * 2**20  # bytes, taken only as far as they are used; llguidance takes 9 KB for a reference in a reference
_SETTING = threading.Lock()


def with_room(call: Callable[[], T]) -> T:
    """What a call gives or raises. Where a stack ends, the process does, so it has to be deep enough for all input."""
    pool = ThreadPoolExecutor(max_workers=1)
    with _SETTING:
        usual = threading.stack_size(STACK)
        try:
            found = pool.submit(call)  # the thread begins here
        finally:
            threading.stack_size(usual)
    try:
        return found.result()
    finally:
        pool.shutdown(wait=False)
