"""Texts that end a generation, wherever they fall across tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on, but for a stop string and what could still become one.

    Args:
        stops: the strings; empty ones are ignored.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def take(self, text: str, last: bool = False) -> tuple[str, bool]:
        """Takes the next piece of text.

        Args:
            text: the piece; may be empty.
            last: whether nothing follows, so that nothing needs to be held back.

        Returns:
            the text that can be given out, and whether a stop string was found after it.
        """
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            out, self._held = self._held[: min(found)], ""
            return out, True
        keep = 0 if last else self._beginning_of_a_stop()
        at = len(self._held) - keep
        out, self._held = self._held[:at], self._held[at:]
        return out, False

    def _beginning_of_a_stop(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        for length in range(min(len(self._held), max(map(len, self._stops), default=0)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
