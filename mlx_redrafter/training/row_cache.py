"""Keeps records of equal size on disk, one for each row of text, within a byte budget.

Knows nothing of what a record holds.
"""

from __future__ import annotations

import pathlib

import numpy as np

from mlx_redrafter.errors import UserError


class RowCache:
    """Appends records and finds them again, in this process or the next.

    A record counts once its row number is in the index, which is written after it: a
    process that is killed leaves whole records or none.

    Args:
        folder: of records.bin and index.bin; made if absent.
        record_bytes: size of a record; what is there already has this size, or is another's.
        budget: bytes that records may take; beyond it nothing is kept.
    """

    def __init__(self, folder: pathlib.Path, record_bytes: int, budget: int):
        self.record_bytes, self._room = record_bytes, budget // record_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._records = (folder / "records.bin").open("ab+", buffering=0)
            self._index = (folder / "index.bin").open("ab+", buffering=0)
            held = min(self._records.seek(0, 2) // record_bytes, self._index.seek(0, 2) // 4)
            self._records.truncate(held * record_bytes)
            self._index.truncate(held * 4)
            self._index.seek(0)
            order = np.frombuffer(self._index.read(), np.int32)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
        self._slots = {int(row): slot for slot, row in enumerate(order)}

    def holds(self, row: int) -> bool:
        """Whether there is a record of a row."""
        return row in self._slots

    def get(self, row: int) -> bytes | None:
        """The record of a row, or None."""
        slot = self._slots.get(row)
        if slot is None:
            return None
        self._records.seek(slot * self.record_bytes)
        return self._records.read(self.record_bytes)

    def put(self, row: int, record: bytes) -> None:
        """Keeps a record, if it is new, there is room in the budget, and there is room on the disk."""
        if row in self._slots or len(self._slots) >= self._room:
            return
        held = len(self._slots)
        try:
            if self._records.write(record) != len(record) or self._index.write(np.int32(row).tobytes()) != 4:
                raise OSError
        except OSError:  # a full disk costs time, not the run
            self._room = held
            self._records.truncate(held * self.record_bytes)
            self._index.truncate(held * 4)
            return
        self._slots[row] = held

    def close(self) -> None:
        self._records.close()
        self._index.close()
