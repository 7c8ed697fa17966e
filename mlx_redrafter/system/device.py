"""Says what computes: the GPU's or the processor's name, its cores, the threads of its BLAS.

Knows nothing of models.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from typing import Any

import mlx.core as mx

from mlx_redrafter.system.openblas import prefer_openblas


def on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


def device_name() -> str:
    """The name of what computes: the GPU's, or the processor's with its number of cores."""
    if not on_cpu():
        return str(mx.device_info().get("device_name", "GPU"))
    return f"CPU ({_processor()}, {_cores()} cores)"


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text("utf-8", errors="replace").split("\n"):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    elif platform.system() == "Darwin":
        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        if name := done.stdout.strip():
            return name
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> float:
    """Bytes of the memory that weights lie in: what MLX recommends to use of a GPU's, else all of the machine's."""
    facts = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if isinstance(size := facts.get(key), int):
            return float(size)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def blas_threads() -> int | None:
    """Threads of the OpenBLAS in this process; None where there is none."""
    process: Any = ctypes.CDLL(None)  # OpenBLAS, if any, was opened for the whole process
    try:
        return int(process.openblas_get_num_threads())
    except AttributeError:
        return None


def load_average() -> float:
    """Processes that ran or waited for a core, on average over the last minute."""
    return os.getloadavg()[0]


def stalling() -> str | None:
    """One line for people where threads of OpenBLAS will wait for each other on cores that others keep busy.

    A product ends when its last thread does, and the others spin until then: a thread that has
    to wait for a core holds up all of them. Threads that have nothing to do sleep, see
    `openblas`, but that does not help within a product.
    """
    threads = blas_threads() if on_cpu() else None
    if threads is None or threads < 2 or (busy := load_average()) <= 1.5 * _cores():
        return None
    return (
        f"other work keeps the {_cores()} cores busy (load average {busy:.1f}), and {threads} threads of OpenBLAS wait"
        " for each other then; OPENBLAS_NUM_THREADS=1 is often faster"
    )


def device_facts() -> dict[str, str]:
    """Device, system and versions."""
    facts = {"device": device_name()}
    if on_cpu():
        threads = blas_threads()
        on = "" if threads is None else f" on {threads} thread{'s' if threads > 1 else ''}"
        facts["float32 products by"] = f"{prefer_openblas()}{on}"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm", "mlx-redrafter")]
    facts["versions"] = ", ".join([*versions, f"Python {platform.python_version()}"])
    facts["system"] = platform.platform(terse=True)
    return facts
