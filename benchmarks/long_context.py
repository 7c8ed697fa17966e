"""Prepares long contexts: text of any length, models that read it, and caches with room to spare.

Knows nothing of what is measured behind them.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.embedded.corpus import stdlib_files
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.cache.kv_cache import leaves


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


def cache_bytes(model: nn.Module, tokens: int) -> int:
    """Bytes of mlx-lm's own caches of so many tokens: windows keep their last ones, and states stay as they are."""
    total = 0
    for cache in _read_once(model):
        state: Any = tree_flatten(cache.state)
        arrays = [array for _, array in state if isinstance(array, mx.array)]
        if isinstance(cache, ArraysCache):
            total += sum(array.nbytes for array in arrays)
        else:  # (batch, heads, rows, size), with room for more rows than the one that was read
            most = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None) or tokens
            total += min(tokens, most) * sum(array.nbytes // array.shape[2] for array in arrays)
    return total


def roomy_cache(model: nn.Module, rows: int) -> list[Any]:
    """Empty mlx-lm caches whose buffers already have room for so many rows; windows and states have none to spare."""
    caches = make_prompt_cache(model)
    for new, read in zip(leaves(caches), _read_once(model), strict=True):
        if isinstance(read, KVCache) and read.keys is not None and read.values is not None:
            new.keys, new.values = (
                mx.zeros((*buffer.shape[:2], rows, buffer.shape[3]), buffer.dtype)
                for buffer in (read.keys, read.values)
            )
            mx.eval(new.keys, new.values)
    return caches


def _read_once(model: nn.Module) -> list[Any]:
    """The caches of all layers behind one token."""
    caches = make_prompt_cache(model)
    model(mx.zeros((1, 1), mx.int32), cache=caches)
    return list(leaves(caches))
