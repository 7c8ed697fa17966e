"""Who may ask: those with the key, and of web pages those from allowed origins. Knows nothing of what is asked."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from email.message import Message

from mlx_redrafter.server.answers import Answer


def check_origin(headers: Message, origins: Sequence[str]) -> None:
    """Raises Answer for a web page that is not allowed. Other programs send no origin."""
    origin = headers.get("Origin")
    if origin is not None and not cors_headers(headers, origins):
        raise Answer(403, f"the origin {origin} is not allowed; --allowed-origins names those that are")


def check_key(headers: Message, key: str | None) -> None:
    """Raises Answer where there is a key and it was not sent, as OpenAI's clients or Anthropic's do."""
    given = headers.get("x-api-key") or headers.get("Authorization", "").partition(" ")[2]
    # Headers are read as Latin-1, whatever they were written as.
    if key is not None and not hmac.compare_digest(given.strip().encode("latin-1", "replace"), key.encode()):
        raise Answer(401, "the API key is missing or wrong")


def cors_headers(headers: Message, origins: Sequence[str]) -> dict[str, str]:
    """What lets an allowed web page read the answer; nothing for others."""
    origin = headers.get("Origin")
    if origin is None or not {"*", origin} & set(origins):
        return {}
    return {
        "Access-Control-Allow-Origin": origin,
        "Vary": "Origin",
        "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
        # A * would not stand for Authorization.
        "Access-Control-Allow-Headers": headers.get("Access-Control-Request-Headers", "*"),
    }
