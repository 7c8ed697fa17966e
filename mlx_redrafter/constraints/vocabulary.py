"""A tokenizer's tokens as bytes, as grammars need them. Knows nothing of grammars."""

from __future__ import annotations

import json
import weakref
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.errors import UserError

# Of Llama's tokenizers; llguidance takes none of SentencePiece's manner without the bytes.
_PIECES = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ],
}
_KNOWN: weakref.WeakKeyDictionary[Any, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def vocabulary(tokenizer: TokenizerWrapper, size: int) -> Any:
    """llguidance's form of a tokenizer; made once, which takes about a second for 100,000 tokens.

    Args:
        size: of the target's vocabulary; ids that the tokenizer has not got are never allowed.

    Raises:
        UserError: a tokenizer of Python alone, or of another kind than byte-level BPE and SentencePiece.
    """
    from llguidance import LLTokenizer

    ends = sorted(tokenizer.eos_token_ids)
    made, found = _KNOWN.get(tokenizer._tokenizer, (None, None))
    if made == (size, ends):
        return found
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not ends:
        what = "has no token that ends a text" if backend is not None else "is no fast one"
        raise UserError(f"structured output: the model's tokenizer {what}")
    fields = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    if (most := max(tokenizer.get_vocab().values(), default=-1)) >= size:
        raise UserError(f"structured output: the tokenizer has token {most}, the model only {size} tokens")
    pieces = any("▁" in token for token in tokenizer.get_vocab())
    try:
        try:
            found = LLTokenizer(json.dumps(fields), n_vocab=size, eos_token=ends)
        except ValueError:
            if not pieces:
                raise
            found = LLTokenizer(json.dumps(fields | {"decoder": _PIECES}), n_vocab=size, eos_token=ends)
    except ValueError as error:
        raise UserError(f"structured output: the model's tokenizer is of an unknown kind ({error})") from None
    _KNOWN[tokenizer._tokenizer] = (size, ends), found
    return found
