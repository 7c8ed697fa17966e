"""Reads tokenizers, also those that come as SentencePiece's tokenizer.model alone.

Knows nothing of weights.
"""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.system.files import read_json, write_json
from mlx_redrafter.text.checks import TOKENIZER_FILES, check_sentencepiece, reads_as_sentencepiece
from mlx_redrafter.text.loading import open_tokenizer, remote_code


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
    tokenizer = open_tokenizer(source, config, remote_code(trust_remote_code))
    if reads_as_sentencepiece(source, tokenizer):
        return tokenizer
    file = source / "tokenizer_config.json"
    fields = read_json(file) if file.exists() else {}
    if "tokenizer_class" not in fields and "auto_map" not in fields:
        folder = scratch / "tokenizer"
        folder.mkdir()
        copy_small_files(source, folder)
        write_json(folder / file.name, {"add_bos_token": True} | fields | {"tokenizer_class": "LlamaTokenizer"})
        tokenizer = open_tokenizer(folder, config, remote_code(trust_remote_code), source)
    check_sentencepiece(source, tokenizer)
    return tokenizer


def copy_small_files(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies a tokenizer, its chat templates and a model's own code into a folder, what is there already excepted."""
    for pattern in (*TOKENIZER_FILES, "*.py", "README.md"):
        for path in source.glob(pattern):
            copy = folder / path.relative_to(source)
            if not path.name.endswith(".index.json") and not copy.exists():
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(path, copy)
