"""GGUF files, llama.cpp's format, read as mlx-lm models.

Knows nothing of drafters or decoding. Public: `write_model` (a directory from a file), `as_directory` and `converted`
(the same, kept in the cache directory) and `find_gguf` (which file a path, a directory or a Hub repository means).
"""

from __future__ import annotations

from mlx_redrafter.gguf.find import find_gguf, is_gguf
from mlx_redrafter.gguf.kept import as_directory, converted
from mlx_redrafter.gguf.model import Summary, write_model

__all__ = ["Summary", "as_directory", "converted", "find_gguf", "is_gguf", "write_model"]
