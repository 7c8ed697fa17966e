"""What computes: the GPU's or the processor's name, its cores, the threads of its BLAS."""

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


def blas_threads() -> int | None:
    """Threads of the OpenBLAS in this process; None where there is none."""
    process: Any = ctypes.CDLL(None)  # OpenBLAS, if any, was opened for the whole process
    try:
        return int(process.openblas_get_num_threads())
    except AttributeError:
        return None


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
