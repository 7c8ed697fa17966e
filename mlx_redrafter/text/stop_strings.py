"""Texts that end a generation, wherever they fall across tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on, but for a stop string and what could still become one.

    Args:
        stops: the strings; empty ones are ignored.

    Attributes:
        found: the one that ended the text.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None

    def take(self, text: str, last: bool = False) -> tuple[str, bool]:
        """Takes the next piece of text.

        Args:
            text: the piece; may be empty.
            last: whether nothing follows, so that nothing needs to be held back.

        Returns:
            the text that can be given out, and whether a stop string was found after it.
        """
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.found = min(found)
            out, self._held = self._held[:at], ""
            return out, True
        at = len(self._held)
        # What is held back is the longest end of the text that a stop string begins with.
        for start in range(max(0, at - max(map(len, self._stops), default=0)), 0 if last else at):
            if any(stop.startswith(self._held[start:]) for stop in self._stops):
                at = start
                break
        out, self._held = self._held[:at], self._held[at:]
        return out, False
