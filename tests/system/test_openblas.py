"""OpenBLAS in front of MLX's own BLAS on Linux."""

import os
import subprocess
import sys

import pytest

from mlx_redrafter.system import device, openblas
from mlx_redrafter.system.openblas import IDLE_VARIABLE, cache_dir, prefer_openblas

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
PRODUCT = """
import mlx_redrafter.system.openblas as blas
print(blas.prefer_openblas())
import time, mlx.core as mx
w, x = mx.random.normal((1024, 1024)), mx.random.normal((64, 1024)); mx.eval(w, x, x @ w)
times = []
for _ in range(3):
    tic = time.perf_counter(); mx.eval(x @ w); times.append(time.perf_counter() - tic)
print(64 * 1024 * 1024 * 2 / min(times) / 1e9)
print(mx.abs((x @ w)[0, 0] - mx.sum(x[0] * w[:, 0])).item())
"""


def run(**variables):
    done = subprocess.run(
        [sys.executable, "-c", PRODUCT], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    name, speed, error = done.stdout.splitlines()
    assert float(error) < 1e-2
    return name, float(speed)


@linux
def test_makes_products_fast():
    """If this fails, everything on Linux is ten times slower than it could be."""
    name, speed = run()
    assert name.startswith("OpenBLAS") and name == prefer_openblas()
    slow_name, slow = run(MLX_REDRAFTER_BLAS="off")
    assert "is off" in slow_name
    assert speed > 3 * slow


@linux
def test_made_from_the_wheel_once(tmp_path):
    """If this fails, the renamed library is made at every start, or not at all."""
    pytest.importorskip("scipy_openblas32")
    code = "import mlx_redrafter.system.openblas as b; print(b._load(str(b._from_wheel())))"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith("OpenBLAS")
        [file] = (tmp_path / "mlx-redrafter").iterdir()
        made = file.stat().st_mtime_ns
        assert file.suffix == ".so"
    assert file.stat().st_mtime_ns == made


@linux
@pytest.mark.parametrize(("system", "first"), [("0.3.21", "wheel"), ("0.3.99", "system"), (None, "wheel")])
def test_the_newer_library_is_taken(monkeypatch, tmp_path, system, first):
    """If this fails, a distribution's old library is preferred, which is five times slower on new processors."""
    if system is not None:
        (tmp_path / openblas._SYSTEM).write_bytes(b"\0" * 99 + f"OpenBLAS {system} DYNAMIC_ARCH".encode() + b"\0")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setattr(openblas, "_usual_places", lambda: [])
    monkeypatch.setattr(openblas.importlib.metadata, "version", lambda name: "0.3.34.481.3")
    monkeypatch.setattr(openblas, "_from_wheel", lambda: "wheel")
    monkeypatch.delitem(sys.modules, "mlx.core")
    tried = []
    monkeypatch.setattr(openblas, "_load", lambda path: tried.append(path))
    assert openblas._choose().startswith("MLX's own BLAS, slow")
    assert tried == (["wheel", openblas._SYSTEM] if first == "wheel" else [openblas._SYSTEM, "wheel"])


def test_the_version_in_a_library(tmp_path):
    (tmp_path / "other.so").write_bytes(b"nothing")
    assert openblas.version_in(tmp_path / "other.so") == ()
    if (wheel := openblas._from_wheel()) is not None:
        assert openblas.version_in(wheel) >= (0, 3, 20)


@pytest.mark.parametrize(("load", "threads", "says"), [(9.0, 2, True), (9.0, 1, False), (1.0, 2, False)])
def test_busy_cores_are_named(monkeypatch, load, threads, says):
    """If this fails, two threads that wait for each other on busy cores are slow without a word."""
    monkeypatch.setattr(device, "load_average", lambda: load)
    monkeypatch.setattr(device, "blas_threads", lambda: threads)
    monkeypatch.setattr(device, "on_cpu", lambda: True)
    monkeypatch.setattr(device, "_cores", lambda: 2)
    assert ("load average 9.0" in (device.stalling() or "")) is says


@linux
def test_a_library_that_cannot_be_loaded_is_no_disaster(tmp_path):
    name, _ = run(MLX_REDRAFTER_BLAS=str(tmp_path / "none.so"))
    assert name.startswith("MLX's own BLAS") and "none.so" in name


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache_dir()) == "/somewhere/mlx-redrafter"


@linux
def test_idle_threads_sleep():
    """If this fails, OpenBLAS spins between products on cores that MLX needs for everything else."""
    code = "import os, mlx_redrafter.system.openblas as b; b.prefer_openblas(); print(os.environ[b.IDLE_VARIABLE])"

    def setting(**variables):
        env = {k: v for k, v in os.environ.items() if k != IDLE_VARIABLE} | variables
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout

    assert int(setting()) < 20  # 2^20 cycles are a third of a millisecond
    assert int(setting(**{IDLE_VARIABLE: "26"})) == 26  # the user's own wish
