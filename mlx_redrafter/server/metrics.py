"""Counts requests, tokens and drafts in Prometheus' format. Knows nothing of how they come about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlx_redrafter.text.responses import GenerationResponse

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The figures of one server.

    Args:
        waiting: tells how many requests wait for their turn.
        prompt_cache: mlx_lm's.
    """

    def __init__(self, waiting: Callable[[], int], prompt_cache: Any):
        self._registry = CollectorRegistry()

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"mlx_redrafter_{name}", words, labels, registry=self._registry)

        def gauge(name: str, words: str, function: Callable[[], int]) -> None:
            Gauge(f"mlx_redrafter_{name}", words, registry=self._registry).set_function(function)

        def histogram(name: str, words: str) -> Histogram:
            return Histogram(f"mlx_redrafter_{name}", words, registry=self._registry, buckets=SECONDS)

        self._requests = counter("requests", "Requests by path and status.", "path", "status")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._cached = counter("cached_prompt_tokens", "Tokens of prompts that were cached.")
        self._generated = counter("generated_tokens", "Tokens of answers.")
        self._steps = counter("verifications", "Verifications that the answers took.")
        self._drafted = counter("draft_tokens", "Draft tokens that were verified.")
        self._accepted = counter("accepted_tokens", "Draft tokens that were accepted.")
        self._forced = counter("forced_tokens", "Tokens that a schema forced, verified beside others; no drafts.")
        self._first = histogram("first_token_seconds", "Seconds from a request to its first token.")
        self._seconds = histogram("request_seconds", "Seconds from a request to the end of its answer.")
        gauge("waiting_requests", "Requests whose turn has not come.", waiting)
        gauge("prompt_cache_bytes", "Bytes of cached prompts.", lambda: prompt_cache.nbytes)
        gauge("prompt_cache_sequences", "Cached prompts.", lambda: len(prompt_cache))

    def count_request(self, path: str, status: int) -> None:
        """Counts a request that has ended, whatever became of it."""
        self._requests.labels(path, str(status)).inc()

    def count_text(self, prompt_tokens: int, first_seconds: float | None, seconds: float, last: Any) -> None:
        """Counts a text that has ended.

        Args:
            prompt_tokens: all of its prompt.
            first_seconds: until its first token; None where there is none.
            last: its last response; None where there is none.
        """
        self._seconds.observe(seconds)
        if first_seconds is None or last is None:
            return
        self._first.observe(first_seconds)
        self._prompt.inc(prompt_tokens)
        self._cached.inc(prompt_tokens - last.prompt_tokens)
        self._generated.inc(last.generation_tokens)
        if isinstance(last, GenerationResponse):
            self._steps.inc(last.steps)
            self._drafted.inc(last.draft_tokens)
            self._accepted.inc(last.accepted_tokens)
            self._forced.inc(last.forced_tokens)

    def text(self) -> bytes:
        """All figures as Prometheus reads them."""
        return generate_latest(self._registry)
