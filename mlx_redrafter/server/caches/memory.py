"""KV caches of earlier requests, for those that begin alike: mlx_lm's, within the memory and disk that is there.

Knows nothing of requests.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import can_trim_prompt_cache
from mlx_lm.server import LRUPromptCache

from mlx_redrafter.drafting.proposers import forget
from mlx_redrafter.server.caches.files import CacheFiles
from mlx_redrafter.system.device import memory_bytes
from mlx_redrafter.tuning.pair_key import identity

SHARE = 0.25  # of the memory that the model leaves


class PromptCaches(LRUPromptCache):
    """mlx_lm's, but that a prompt which is cached whole has its last token read again.

    Args:
        max_size: sequences.
        max_bytes: of all of them; None for a share of the memory that the first model leaves.
        files: where they outlive the process; None for nowhere.
        form: what else than the model they depend on, in the name of a directory.
    """

    def __init__(self, max_size: int, max_bytes: int | None, files: CacheFiles | None = None, form: str = ""):
        super().__init__(max_size, *(() if max_bytes is None else (max_bytes,)))
        self._bounded, self._files, self._form = max_bytes is not None, files, form
        self._identities: dict[Any, str] = {}  # of models, by mlx_lm's keys of them
        self._unwritten: list[tuple[str, list[int], list[Any]]] = []

    def open(self, key: Any, model: nn.Module) -> None:
        """Is told of a model that was loaded; takes what the files have for it, once."""
        if not self._bounded:
            self.max_bytes, self._bounded = max(0, int(SHARE * (memory_bytes() - mx.get_active_memory()))), True
        if self._files is None or key in self._identities:
            return
        self._identities[key] = identity(model) + self._form
        for tokens, cache in self._files.read(model, self._identities[key], self.max_bytes):
            super().insert_cache(key, tokens, cache)

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        # A model has to read at least one token, and what follows depends on what it reads.
        cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
        if self._files is not None and model in self._identities and cache is not None:
            self._files.use(self._identities[model], tokens[: len(tokens) - 1 - len(rest)])
        return cache, rest + tokens[-1:]

    def insert_cache(self, model: Any, tokens: list[int], prompt_cache: list[Any], **named: Any) -> None:
        if not tokens:  # of a text that was ended before its first token
            return
        # mlx_lm gives out copies, by which nobody finds what a drafter left; it would be held, and not counted.
        forget(prompt_cache[0])
        super().insert_cache(model, tokens, prompt_cache, **named)
        if self._files is not None and model in self._identities:
            mine = self._identities[model]
            if can_trim_prompt_cache(prompt_cache):  # shorter ones can be cut from this one
                self._unwritten = [one for one in self._unwritten if one[:2] != (mine, tokens[: len(one[1])])]
            self._unwritten = [*self._unwritten, (mine, tokens, prompt_cache)][-max(1, self.max_size) :]

    def write_one(self) -> bool:
        """Writes one cache that no file has yet, where there is one; says whether there was."""
        if self._files is None or not self._unwritten:
            return False
        mine, tokens, cache = self._unwritten.pop(0)
        self._files.write(mine, tokens, cache, can_trim_prompt_cache(cache))
        return True

    def close(self) -> None:
        """Writes all that no file has yet."""
        while self.write_one():
            pass
        if self._files is not None:
            self._files.close()
