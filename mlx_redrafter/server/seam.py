"""Puts our generation in the place of mlx_lm.server's, and checks that what it relies on is there.

The one place that changes a module of mlx_lm. Knows nothing of requests.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Generator, Iterator
from typing import Any

from mlx_redrafter.errors import UserError, one_line

VERSIONS = "0.32"
# What is subclassed or called, and the names that our overrides use or take the place of.
CLASSES = {
    "ModelProvider": ("load", "load_default", "reset"),
    "ResponseGenerator": (
        "_generate", "_next_request", "_run_generate", "_serve_single", "_tokenize", "_make_state_machine", "generate",
        "generation_available", "stop_and_join", "_is_batchable", "_share_object",
    ),
    "APIHandler": (
        "do_GET", "do_OPTIONS", "do_POST", "handle_completion", "handle_chat_completions", "handle_text_completions",
        "generate_response", "completion_usage_response", "_set_completion_headers", "_set_cors_headers",
    ),
    "LRUPromptCache": ("fetch_nearest_cache", "insert_cache", "trim_to"),
}  # fmt: skip
FUNCTIONS = {
    "stream_generate": ("model", "tokenizer", "prompt", "max_tokens", "draft_model", "stream"),
    "load_processor": ("model", "config"),
    "BatchGenerator": ("model", "completion_batch_size", "prefill_batch_size", "prefill_step_size", "stream"),
}
FIELDS = {
    "GenerationArguments": ("sampling", "logits", "stop_words", "logprobs", "top_logprobs", "seed"),
    "SamplingArguments": ("temperature", "top_p", "top_k", "min_p", "xtc_probability", "xtc_threshold"),
    "CompletionRequest": ("request_type", "prompt", "messages", "tools", "role_mapping"),
    "Response": ("text", "token", "logprob", "finish_reason", "top_tokens"),
}  # fmt: skip

Stream = Callable[..., Generator[Any]]
_OURS: contextvars.ContextVar[Stream | None] = contextvars.ContextVar("ours", default=None)
_BATCH: contextvars.ContextVar[Callable[..., Any]] = contextvars.ContextVar("batch")
_THEIRS: list[Stream] = []


def install() -> None:
    """Makes mlx_lm.server call the functions of `generating` and `batching` where there are any. Once is enough.

    Raises:
        UserError: this mlx-lm is not one that the server was written for.
    """
    if _THEIRS:
        return
    missing = missing_names()
    if missing:
        raise UserError(
            f"serve needs mlx-lm {VERSIONS}, found {importlib.metadata.version('mlx-lm')} ({missing[0]} is missing)"
        )
    import mlx_lm.server as server

    _THEIRS.append(server.stream_generate)

    @functools.wraps(_THEIRS[0])
    def stream_generate(**arguments: Any) -> Generator[Any]:
        return (_OURS.get() or theirs)(**arguments)

    their_batch = server.BatchGenerator

    @functools.wraps(their_batch, updated=())
    def batch_generator(model: Any, **options: Any) -> Any:
        return (_BATCH.get(None) or their_batch)(model, **options)

    server.stream_generate = stream_generate  # type: ignore[assignment]
    server.BatchGenerator = batch_generator  # type: ignore[assignment,misc]


def theirs(**arguments: Any) -> Generator[Any]:
    """mlx_lm's own generation."""
    return _THEIRS[0](**arguments)


@contextlib.contextmanager
def generating(stream: Stream) -> Iterator[None]:
    """While it lasts, mlx_lm.server generates with this function in this thread."""
    before = _OURS.set(stream)
    try:
        yield
    finally:
        _OURS.reset(before)


@contextlib.contextmanager
def batching(make: Callable[..., Any]) -> Iterator[None]:
    """While it lasts, mlx_lm.server makes its batch generators with this function in this thread."""
    before = _BATCH.set(make)
    try:
        yield
    finally:
        _BATCH.reset(before)


def missing_names() -> list[str]:
    """What the installed mlx_lm.server lacks of the names that are relied on."""
    try:
        import mlx_lm.server as server
    except ImportError as error:
        return [f"mlx_lm.server: {one_line(error)}"]
    found = []
    for name, methods in CLASSES.items():
        found += [f"{name}.{method}" for method in methods if not hasattr(getattr(server, name, None), method)]
    for name, arguments in FUNCTIONS.items():
        known = _parameters(getattr(server, name, None))
        found += [f"{name}({argument})" for argument in arguments if argument not in known]
    for name, fields in FIELDS.items():
        there = getattr(getattr(server, name, None), "__dataclass_fields__", {})
        found += [f"{name}.{field}" for field in fields if field not in there]
    return found


def _parameters(function: Any) -> set[str]:
    return set() if function is None else set(inspect.signature(function).parameters)
