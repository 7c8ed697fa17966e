"""KV caches of earlier requests where each of several processes has a part of them: all keep and find the same.

Knows nothing of requests.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_redrafter.server.caches.memory import PromptCaches
from mlx_redrafter.system.ranks import Ranks
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import apart

UNBOUNDED = 1 << 63


class SharedPromptCaches(PromptCaches):
    """Rank 0 counts the bytes, and says how many caches stay; the rest follows from what was asked, in one order.

    Args:
        ranks: the processes.
        max_size, max_bytes: as in `PromptCaches`; each process has so many bytes, or what the poorest one can spare.
    """

    def __init__(self, ranks: Ranks, max_size: int, max_bytes: int | None):
        super().__init__(max_size, max_bytes)
        self._ranks, self._most_bytes = ranks, UNBOUNDED

    def open(self, key: Any, model: nn.Module) -> None:
        super().open(key, model)
        if self.max_bytes == UNBOUNDED:
            return
        kilobytes = mx.array(min(self.max_bytes >> 10, 2**31 - 1), mx.int32)
        least: Any = mx.distributed.all_min(kilobytes, group=self._ranks.group, stream=mx.cpu).item()
        self._most_bytes, self.max_bytes = least << 10, UNBOUNDED
        if apart(Target.of(model), make_prompt_cache(model)):
            self.max_size = 0  # a part of them might be cut where another cannot

    def insert_cache(self, model: Any, tokens: list[int], prompt_cache: list[Any], **named: Any) -> None:
        super().insert_cache(model, tokens, prompt_cache, **named)
        self.trim_to(n_bytes=self._most_bytes)

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        if self._ranks.first:
            super().trim_to(n_sequences=n_sequences, n_bytes=n_bytes)
        super().trim_to(n_sequences=self._ranks.share(len(self)))
