"""Prompts as text and token ids: chat templates, and what a prompt cache already holds of them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.errors import UserError, one_line

_QUERY = "<query>"


def encode(tokenizer: TokenizerWrapper, prompt: str | list[int] | mx.array) -> list[int]:
    """Token ids of a prompt, special tokens added to text as mlx-lm does.

    Raises:
        UserError: an empty prompt, or text that is not valid Unicode.
    """
    if isinstance(prompt, mx.array):
        ids = [int(token) for token in prompt]
    elif isinstance(prompt, str):
        check_text(prompt, "the prompt")
        special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
        ids = tokenizer.encode(prompt, add_special_tokens=special)
    else:
        ids = list(prompt)
    if not ids:
        raise UserError("the prompt is empty: expected at least one token")
    return ids


def encode_messages(
    tokenizer: TokenizerWrapper, messages: list[dict[str, str]], options: dict[str, Any], after_cache: bool = False
) -> list[int]:
    """Token ids of a conversation by the tokenizer's chat template.

    Args:
        options: more arguments for the template.
        after_cache: a prompt cache stands before it. As in mlx-lm, what the template puts
            before the first message of the user is in the cache already, and is left out.

    Raises:
        UserError: a template that fails, or text that is not valid Unicode.
    """
    text = _render(tokenizer, messages, options)
    if after_cache:
        first = next(i for i, message in enumerate(messages) if message["role"] == "user")
        marked = [*messages[:first], {"role": "user", "content": _QUERY}, *messages[first + 1 :]]
        at = _render(tokenizer, marked, options).find(_QUERY)
        if at < 0:
            raise UserError("the tokenizer's chat template leaves the message out: no cache can precede it")
        text = text[at:]
    return list(tokenizer.encode(text, add_special_tokens=False))


def check_text(text: str, what: str) -> None:
    """Raises UserError for text that was not valid UTF-8 where it came from."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not valid UTF-8 at character {error.start}") from error


def _render(tokenizer: TokenizerWrapper, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    for message in messages:
        check_text(message["content"], "the message")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except Exception as error:  # templates are programs of their own
        raise UserError(f"the tokenizer's chat template: {one_line(error)}") from error
