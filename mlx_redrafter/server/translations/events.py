"""Turns a stream of chat completion chunks into events of another API, on their way to the client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Protocol

Event = tuple[str, dict[str, Any]]  # its name and its data


class Translation(Protocol):
    """One request of another API."""

    def chat(self) -> dict[str, Any]:
        """The same request, for chat completions."""

    def whole(self, completion: dict[str, Any]) -> dict[str, Any]:
        """The answer to it, from a chat completion."""

    def piece(self, chunk: dict[str, Any]) -> Iterator[Event]:
        """The events that a chunk becomes."""

    def end(self) -> Iterator[Event]:
        """The events after the last chunk."""


class EventWriter:
    """Takes what mlx_lm's handler writes, and writes it on as events; what is no chunk goes on as it is.

    Args:
        out: where to write.
        translation: of the request that it answers.
    """

    def __init__(self, out: Any, translation: Translation):
        self._out, self._translation = out, translation

    def write(self, data: bytes) -> int:
        if not data.startswith(b"data: "):
            return self._out.write(data)
        if data.startswith(b"data: [DONE]"):
            self._put(self._translation.end())
        elif "error" in (chunk := json.loads(data.removeprefix(b"data: "))):
            self._put(iter([("error", chunk)]))
        else:
            self._put(self._translation.piece(chunk))
        return len(data)

    def _put(self, events: Iterator[Event]) -> None:
        for name, data in events:
            self._out.write(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)


def text_of(content: Any) -> str:
    """The text of a content that is one, or a list of parts."""
    if not isinstance(content, list):
        return content or ""
    return "".join(part.get("text", "") for part in content)
