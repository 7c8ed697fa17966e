"""Types of flags, as argparse takes them: numbers in a range; and flags as they are typed.

Knows nothing of commands.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable
from typing import Any


def whole(least: int, most: int | None = None, also: tuple[int, ...] = (), words: str = "") -> Callable[[str], int]:
    """A type for whole numbers from `least` to `most`, and those in `also`; `words` say it for people."""
    expected = words or (f"{least} or more" if most is None else f"{least} to {most}")

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text!r}, expected a whole number, {expected}") from None
        if value not in also and (value < least or (most is not None and value > most)):
            raise argparse.ArgumentTypeError(f"is {value}, expected {expected}")
        return value

    return read


def real(least: float, most: float = math.inf, words: str = "") -> Callable[[str], float]:
    """A type for finite numbers from `least` to `most`."""
    expected = words or (f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}")

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text!r}, expected a number, {expected}") from None
        if not (math.isfinite(value) and least <= value <= most):
            raise argparse.ArgumentTypeError(f"is {value:g}, expected {expected}")
        return value

    return read


def size(text: str) -> int:
    """A number of bytes, which may end in K, M, G or T, alone or with a B: thousands, millions and so on."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if found is None:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a size like 500MB or 4G")
    return int(float(found[1]) * 1000 ** " KMGT".find(found[2] or " "))


def flag(name: str) -> str:
    """A flag as the user types it, by the name of its value."""
    return f"--{name.replace('_', '-')}"


def typed(given: Iterable[tuple[str, Any]]) -> list[str]:
    """The words of flags with these values, by name."""
    words: list[str] = []
    for name, value in given:
        words.append(flag(name))
        if value is not True:
            words += [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]
    return words
