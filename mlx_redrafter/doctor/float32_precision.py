"""How exact float32 products are: some GPUs round what they multiply to fewer bits.

Knows nothing of models.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_redrafter.doctor.checks import FAILED, NOTE, OK, Check

FULL, REDUCED = 1e-5, 1e-2
SIZES = ((1, 512, 512), (8, 512, 512), (128, 512, 512))  # rows, inner, columns


def products_check() -> Check:
    """Compares products of the default device with float64 ones of NumPy.

    MLX multiplies in TF32 where the hardware has that, unless MLX_ENABLE_TF32 is 0; then a
    product of several rows is rounded otherwise than that of one row, and the promise of
    equal texts in float32 is void.
    """
    rng = np.random.default_rng(0)
    worst = {}
    for rows, inner, columns in SIZES:
        left, right = (rng.standard_normal(size).astype(np.float32) for size in ((rows, inner), (inner, columns)))
        found = np.array(mx.array(left) @ mx.array(right), np.float64)
        exact = left.astype(np.float64) @ right.astype(np.float64)
        worst[rows] = float(np.abs(found - exact).max() / np.abs(exact).max())
    return verdict(worst)


def verdict(worst: dict[int, float]) -> Check:
    """What the largest relative errors, by rows, mean."""
    usable, full = (all(error <= most for error in worst.values()) for most in (REDUCED, FULL))  # not where it is NaN
    detail = "relative error " + ", ".join(f"{error:.0e} of {rows} rows" for rows, error in worst.items())
    figures = {"relative_error_by_rows": worst, "reduced": usable and not full}
    if figures["reduced"]:
        detail += ": fewer bits than float32 has; MLX_ENABLE_TF32=0 keeps all"
    return Check("float32 products", OK if full else NOTE if usable else FAILED, detail, figures=figures)
