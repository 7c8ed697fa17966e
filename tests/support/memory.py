"""What a process holds, as Linux tells it."""

import os
import pathlib


def resident(pid=None):
    """Kilobytes of memory that a process has, this one if it is not named."""
    status = pathlib.Path(f"/proc/{pid or os.getpid()}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])
