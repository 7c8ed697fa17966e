"""What a process holds, as Linux tells it, and what MLX held at most, beyond what it has to."""

import os
import pathlib

import mlx.core as mx

PAIR = os.environ.get("BATCH_PAIR", "").split()  # target and drafter that batches are looked at with; the embedded pair


def resident(pid=None):
    """Kilobytes of memory that a process has, this one if it is not named."""
    status = pathlib.Path(f"/proc/{pid or os.getpid()}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


class Peaks:
    """Steps of a batch, one by one, and what was there in each beyond weights and the caches of the texts.

    A text that leaves is one of them until its last step has been read.

    Args:
        held: bytes of the weights.

    Attributes:
        most: the largest share beyond them.
        worst: what it was: peak, weights and caches in bytes.
        caches: the largest ones.
    """

    def __init__(self, batch, held):
        self.batch, self.held, self.most, self.worst, self.caches = batch, held, 0.0, (0, 0), 0

    def step(self):
        before = self.batch.nbytes
        mx.reset_peak_memory()
        found = self.batch.step()
        caches, peak = max(before, self.batch.nbytes), mx.get_peak_memory()
        over = peak / (self.held + caches) - 1
        if over > self.most:
            self.most, self.worst = over, (peak, self.held + caches)
        self.caches = max(self.caches, caches)
        return found
