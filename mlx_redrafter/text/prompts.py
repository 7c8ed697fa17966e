"""Turns prompts into token ids: text, ids in any array, messages by a chat template. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.errors import UserError, one_line

Prompt: TypeAlias = str | Sequence[int] | mx.array | np.ndarray
_QUERY = "<query>"


def encode(tokenizer: TokenizerWrapper, prompt: Prompt) -> list[int]:
    """Token ids of a prompt, special tokens added to text as mlx-lm does.

    Args:
        prompt: text, or whole numbers as a list or array of shape (n,) or (1, n).

    Raises:
        UserError: an empty prompt, an array of another kind, or text that is not valid Unicode.
    """
    if isinstance(prompt, str):
        check_text(prompt, "the prompt")
        special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
        ids = list(tokenizer.encode(prompt, add_special_tokens=special))
    else:
        ids = _ids(prompt)
    if not ids:
        raise UserError("the prompt is empty: expected at least one token")
    return ids


def encode_messages(
    tokenizer: TokenizerWrapper, messages: list[dict[str, Any]], options: dict[str, Any], after_cache: bool = False
) -> list[int]:
    """Token ids of a conversation by the tokenizer's chat template.

    Args:
        messages: as `plain_messages` takes them.
        options: more arguments for the template.
        after_cache: a prompt cache stands before it. As in mlx-lm, what the template puts
            before the first message of the user is in the cache already, and is left out.

    Raises:
        UserError: a template that fails, a message without text, or text that is not valid Unicode.
    """
    messages = plain_messages(messages)
    text = render(tokenizer, messages, options)
    if after_cache:
        first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
        if first is None:
            raise UserError("no message has the role user: nothing can follow the prompt cache")
        marked = [*messages[:first], {"role": "user", "content": _QUERY}, *messages[first + 1 :]]
        at = render(tokenizer, marked, options).find(_QUERY)
        if at < 0:
            raise UserError("the tokenizer's chat template leaves the message out: no cache can precede it")
        text = text[at:]
    return list(tokenizer.encode(text, add_special_tokens=False))


def render(
    tokenizer: TokenizerWrapper,
    messages: list[dict[str, Any]],
    options: dict[str, Any] | None = None,
    ask: bool = True,
    where: str = "",
) -> str:
    """A conversation as the tokenizer's chat template writes it.

    Args:
        options: more arguments for the template.
        ask: whether the assistant is to go on.
        where: what the messages come from, for an error.

    Raises:
        UserError: a template that fails.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask, **(options or {}))
    except Exception as error:  # templates are programs of their own
        raise UserError(f"{where}{': ' * bool(where)}the tokenizer's chat template: {one_line(error)}") from error


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies of messages whose content is one text; OpenAI's lists of text parts are joined.

    A message that calls tools may have no content.

    Raises:
        UserError: naming the message and what was found.
    """
    return [_plain(message, f"message {number}") for number, message in enumerate(messages, 1)]


def check_text(text: str, what: str) -> None:
    """Raises UserError for text that was not valid UTF-8 where it came from."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not valid UTF-8 at character {error.start}") from error


def _ids(prompt: Any) -> list[int]:
    try:
        ids = np.array(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"the prompt is no array of token ids ({one_line(error)})") from error
    if ids.size == 0:
        return []
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise UserError(f"the prompt has shape {ids.shape}, expected (n,) or (1, n)")
    if not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"the prompt has elements of type {ids.dtype}, expected whole numbers")
    return ids.tolist()


def _plain(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{where} is {message!r:.60}, expected an object with role and content")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list) and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        parts = [part for part in content if not _is_text(part)] if isinstance(content, list) else []
        found = f"has a part {parts[0]!r:.60}" if parts else f"has the content {content!r:.60}"
        raise UserError(f"{where} ({message['role']}) {found}, expected text or a list of text parts")
    check_text(content, where)
    return message | {"content": content}


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
