"""Long contexts: text of any length, models that read it, and caches with room to spare."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.embedded.corpus import stdlib_files
from mlx_redrafter.errors import UserError


def long_text(tokenizer: TokenizerWrapper, count: int) -> list[int]:
    """`count` token ids of held-out source, from its beginning again where it ends."""
    ids: list[int] = []
    for _, text, held_out, is_test in stdlib_files():
        if len(ids) >= count:
            break
        if held_out and not is_test:
            ids += tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise UserError("this Python has no source of its standard library to take text from")
    return (ids * (count // len(ids) + 1))[:count]


def lift_context(model: nn.Module, tokens: int) -> None:
    """Lets a model read more tokens than its config says; beyond them its text means nothing, its speed does.

    Only our check of a prompt's length asks the config at run time: rope was made from it at load.
    """
    args = getattr(model, "args", None)
    for owner in (args, getattr(args, "text_config", None)):
        if isinstance(owner, dict) and "max_position_embeddings" in owner:
            owner["max_position_embeddings"] = max(tokens, owner["max_position_embeddings"])
        elif isinstance(getattr(owner, "max_position_embeddings", None), int):
            owner.max_position_embeddings = max(tokens, owner.max_position_embeddings)  # type: ignore[union-attr]


def never_end(tokenizer: TokenizerWrapper) -> None:
    """Makes texts go on past an end-of-text token, for benchmarks that need so many steps."""
    tokenizer.eos_token_ids = set()


def roomy_cache(model: nn.Module, rows: int) -> list[Any]:
    """Empty mlx-lm caches whose buffers already have room for so many rows."""
    caches = make_prompt_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    for cache in caches:
        cache.keys, cache.values = (
            mx.zeros((*buffer.shape[:2], rows, buffer.shape[3]), buffer.dtype) for buffer in (cache.keys, cache.values)
        )
        cache.offset = 0
    mx.eval([(cache.keys, cache.values) for cache in caches])
    return caches


def bytes_per_row(model: nn.Module) -> int:
    """Bytes of keys and values that one token takes in all layers."""
    caches = make_prompt_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    return sum(buffer.nbytes // buffer.shape[2] for cache in caches for buffer in (cache.keys, cache.values))
