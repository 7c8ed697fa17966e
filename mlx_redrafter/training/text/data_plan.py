"""Plans which rows are written, and how many go into which shard.

Knows nothing of how a row is made.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mlx_redrafter.errors import UserError

SELF, REGENERATED, SESSIONS = "self", "regenerated", "sessions"
ROWS = 2048  # rows of text the target writes where the user does not say


@dataclasses.dataclass(frozen=True)
class DataPlan:
    """What `--data` and the flags about text say.

    Attributes:
        length: tokens per row.
        rows: rows in all at most, the held-out ones included; None for all that files or prompts
            give (once each), and 2048 for training where the target writes freely. Fewer come
            where files have no more, or where later turns of a conversation do not fit into a row.
        held_out: rows kept for evaluation, from documents that no training row is from.
        batch_size: rows the target writes at a time.
        rows_per_shard: rows of a shard that the target writes; about so many where files are read.

    Raises:
        UserError: a value out of its range, by the name of its flag.
    """

    data: tuple[str, ...] = (SELF,)
    length: int = 192
    rows: int | None = None
    held_out: int = 16
    temps: tuple[float, ...] = (0.0, 0.5, 1.0)
    seed: int = 0
    prompts: str | None = None
    prefixes: tuple[str, ...] = ()
    prefix_length: int = 32
    batch_size: int = 64
    rows_per_shard: int = 256

    def __post_init__(self) -> None:
        least = {
            "row-length": (self.length, 4),
            "held-out": (self.held_out, 0),
            "seed": (self.seed, 0),
            "prefix-length": (self.prefix_length, 1),
            "write-batch-size": (self.batch_size, 1),
        }
        if self.rows is not None:
            least["rows"] = (self.rows, self.held_out + 1)
        for name, (value, expected) in least.items():
            if value < expected:
                raise UserError(f"--{name} is {value}, expected {expected} or more")
        if not self.temps or not all(0 <= temp < math.inf for temp in self.temps):
            raise UserError(f"--temps {' '.join(map(str, self.temps))}: expected numbers of 0 or more")
        if not self.data:
            raise UserError(f"--data: expected {SELF}, {REGENERATED}, {SESSIONS}, or files")

    def settings(self, **more: Any) -> dict[str, Any]:
        """What the content of every source depends on, and more, by the names of flags."""
        return {
            "data": list(self.data),
            "row-length": self.length,
            "rows": self.rows,
            "held-out": self.held_out,
            "seed": self.seed,
            "rows-per-shard": self.rows_per_shard,
        } | more

    @property
    def training_rows(self) -> int:
        """Rows to train on, where the target writes freely."""
        return (self.rows or ROWS + self.held_out) - self.held_out

    @property
    def shards(self) -> int:
        """Training shards, where the target writes freely."""
        return -(-self.training_rows // self.rows_per_shard)

    def numbers(self, shard: int) -> range:
        """The numbers of a shard's rows among all; the held-out ones for the number after the last shard."""
        if shard == self.shards:
            return range(self.training_rows, self.training_rows + self.held_out)
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.training_rows))

    def temperatures(self, numbers: range) -> list[float]:
        """The temperature of each row."""
        return [self.temps[number % len(self.temps)] for number in numbers]
