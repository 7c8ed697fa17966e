"""One layer's recurrent state, which gets back to where the accepted rows end.

Knows nothing of models: what read the rows calls itself again (see `replay`). A recurrent
layer (Mamba, gated delta nets, RWKV, short convolutions) keeps what it has read in a few
arrays, and rejected tokens cannot be cut off them. So the state from before the step is
kept, and after acceptance the layer's mixer reads the accepted rows again.

How far it reads is a number on the device. Mixers that know mlx-lm's `lengths` (rows beyond
a length are padding, as in a batch) read all rows at once and stop there. The others read
row by row, and one of the states is chosen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from mlx_redrafter.target.tree import TreeFrame

AT_ONCE, ROW_BY_ROW = "at once", "row by row"

# Reads again: takes the frame to read in, what to make of each argument, and the row (None for all).
Replay = Callable[[TreeFrame, Callable[[Any], Any], int | None], None]


class RecurrentCache(ArraysCache):
    """One layer's state arrays, and what is needed to take rows back.

    Attributes:
        replay: AT_ONCE or ROW_BY_ROW, how mixers read again.
        cache: the state arrays; None before anything was read.
        frame: of the verification that is going on.
        step: the last verification, as this layer saw it.
    """

    cache: list[Any]
    lengths: Any

    def __init__(self, size: int, replay: str):
        super().__init__(size)
        self.replay = replay
        self.frame: TreeFrame | None = None
        self.step: RecurrentStep | None = None

    def make_mask(self, N: int) -> Any:
        return super().make_mask(N) if self.frame is None or self.replay == ROW_BY_ROW else self.frame.every_row

    def prepare(self, frame: TreeFrame) -> None:  # type: ignore[override]  # mlx-lm's is for batches
        self.frame = frame
        self.step = RecurrentStep(self, frame, list(self.cache))

    def end(self, length: int) -> None:
        self.step = None

    def arrays(self) -> list[mx.array]:
        return [array for array in self.cache if array is not None]


@dataclasses.dataclass
class RecurrentStep:
    """One verification as one layer saw it.

    Attributes:
        before: the layer's state arrays before it.
        calls: of the layer's mixers, to be made again.
    """

    layer: RecurrentCache
    frame: TreeFrame
    before: list[Any]
    calls: list[Replay] = dataclasses.field(default_factory=list)

    def keep(self, rows: mx.array) -> None:
        """Brings the layer to where it is after the first rows[b] rows, (B,) at least 1, on the device."""
        layer = self.layer
        layer.cache = list(self.before)
        if layer.replay == AT_ONCE:
            mask = mx.arange(self.frame.rows) < rows[:, None]
            for call in self.calls:
                layer.lengths = rows + 0  # a mixer counts it down in place
                call(self._frame_at(0), functools.partial(self._argument, mask=mask), None)
            layer.lengths = None
            return
        states = []
        for row in range(self.frame.rows):
            for call in self.calls:
                call(self._frame_at(row), functools.partial(self._argument, row=row), row)
            states.append(list(layer.cache))
        chosen = states[0]
        for row, later in enumerate(states[1:], 1):
            beyond = rows > row
            chosen = [mx.where(beyond.reshape(-1, *[1] * (new.ndim - 1)), new, old) for old, new in zip(chosen, later)]
        layer.cache = chosen

    def forget(self) -> None:
        """Brings the layer to where it was before all rows."""
        self.layer.cache = list(self.before)

    def _frame_at(self, row: int) -> TreeFrame:
        return dataclasses.replace(self.frame, length=self.frame.length + row, replaying=True)

    def _argument(self, value: Any, row: int | None = None, mask: mx.array | None = None) -> Any:
        """What to call a mixer with in place of an argument that it was called with; of one row, or of all."""
        if value is self.frame.every_row:
            return mask
        if self.frame.is_mask(value):
            return None  # a mask of the attention beside it, whose output is of no use
        if row is None or not isinstance(value, mx.array):
            return value
        if value is self.frame.offset:
            return value + row
        if value.ndim > 1 and value.shape[1] == self.frame.rows:
            return value[:, row : row + 1]
        return value
