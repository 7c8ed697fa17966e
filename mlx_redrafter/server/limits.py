"""What one request, and all that wait, may take. Knows nothing of how it is enforced."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of requests.

    Attributes:
        body_bytes: of a request's body.
        context: tokens of prompt and answer; None for what the model's config says.
        max_tokens: that a request may ask for; None for what the context leaves.
        queue: requests that wait for their turn.
        queue_seconds: after which one that waits is sent away.
    """

    body_bytes: int = 16_000_000
    context: int | None = None
    max_tokens: int | None = None
    queue: int = 64
    queue_seconds: float = 600
