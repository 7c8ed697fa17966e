"""Tokenizers, also those that come as SentencePiece's tokenizer.model alone."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.system.files import read_json
from mlx_redrafter.text.loading import check_sentencepiece, reads_as_sentencepiece, remote_code

_PATTERNS = ("*.json", "*.jinja", "*.py", "*.txt", "tokenizer.model")


def read_tokenizer(
    source: pathlib.Path, scratch: pathlib.Path, config: dict[str, Any], trust_remote_code: bool
) -> TokenizerWrapper:
    """The tokenizer of a model's directory.

    transformers makes one from tokenizer.model by itself, but knows that it is of Llama's
    kind only where tokenizer_config.json says so, and without that gives no text its leading
    space or first token. If what it made reads text otherwise than SentencePiece does, it
    is told so in a copy of the small files; if that does not help, a warning is all we can do.

    Args:
        scratch: a folder for that copy.
        config: the model's, for the tokens that end a text.

    Raises:
        UserError: there is no tokenizer, or none that can be read.
    """
    tokenizer = _load(source, source, config, trust_remote_code)
    if reads_as_sentencepiece(source, tokenizer):
        return tokenizer
    file = source / "tokenizer_config.json"
    fields = read_json(file) if file.exists() else {}
    if "tokenizer_class" not in fields and "auto_map" not in fields:
        folder = scratch / "tokenizer"
        folder.mkdir()
        for path in {path for pattern in _PATTERNS for path in source.glob(pattern)}:
            if not path.name.endswith(".index.json"):
                shutil.copy(path, folder)
        llama = {"add_bos_token": True} | fields | {"tokenizer_class": "LlamaTokenizer"}
        (folder / file.name).write_text(json.dumps(llama))
        tokenizer = _load(source, folder, config, trust_remote_code)
    check_sentencepiece(source, tokenizer)
    return tokenizer


def _load(
    source: pathlib.Path, folder: pathlib.Path, config: dict[str, Any], trust_remote_code: bool
) -> TokenizerWrapper:
    try:
        return load_tokenizer(folder, remote_code(trust_remote_code), eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # whatever transformers makes of the files
        raise UserError(f"{source}: no tokenizer that transformers can read: {one_line(error)}") from error
