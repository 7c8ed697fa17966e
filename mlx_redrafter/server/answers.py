"""What a client is told where it does not get what it asked for: a status, and one line. Knows nothing of models."""

from __future__ import annotations

import logging
import re
from typing import Any

from mlx_redrafter.errors import UserError, one_line

logger = logging.getLogger("mlx_redrafter")
TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    411: "invalid_request_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip
GONE = 499  # the client hung up; nobody reads this


class Answer(BaseException):
    """Ends a request with a status and one line.

    It is no Exception: mlx_lm's handler answers 404 to any of those.

    Args:
        retry_after: seconds after which the client may try again.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after

    def body(self) -> dict[str, Any]:
        """As OpenAI and Anthropic write errors: the outer type is Anthropic's."""
        kind = TYPES.get(self.status, "api_error")
        return {"type": "error", "error": {"message": self.message, "type": kind, "param": None, "code": None}}


class NoSuchModel(UserError):
    """A model, an adapter or a drafter that cannot be loaded."""


class HungUp(Exception):
    """The client of this request has gone."""


def answer_to(error: Exception) -> Answer:
    """What to say of an error; one that is nobody's mistake but ours is logged with where it came from."""
    line = without_paths(one_line(error))
    if isinstance(error, HungUp):
        return Answer(GONE, "the client hung up")
    if isinstance(error, NoSuchModel):
        return Answer(404, line)
    if isinstance(error, UserError):
        return Answer(400, line)
    logger.error("a request ended with an error", exc_info=error)
    return Answer(500, f"{type(error).__name__}: {line}")


def without_paths(text: str) -> str:
    """The same text with nothing but the last part of every path of the machine."""
    return re.sub(r"(?<![\w./:-])~?(?:/[^/\s'\"]+)+/([^/\s'\"]+)", r"\1", text)
