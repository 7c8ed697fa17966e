"""OpenBLAS in front of MLX's own BLAS on Linux."""

import os
import subprocess
import sys

import pytest

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
