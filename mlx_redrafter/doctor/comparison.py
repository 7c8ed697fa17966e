"""One stage of a step, run in two places of the same process, and compared.

A stage starts from fixed inputs, so that what differs arose in it. Whole numbers have to be
equal; others may differ by rounding. The second place is the reference.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np

from mlx_redrafter.doctor.checks import FAILED, NOT_MADE, OK, REPORT, Check
from mlx_redrafter.errors import one_line

Place: TypeAlias = mx.Stream | mx.Device | mx.DeviceType
Outputs: TypeAlias = dict[str, np.ndarray]
# What is wrong with the first results, given the second and the tolerance; empty if nothing is.
Judge: TypeAlias = Callable[[Outputs, Outputs, float], str]
NO_GPU = "GPU against CPU: there is no GPU here"


class Places(NamedTuple):
    """Where stages run: what is tested, and what it is compared with."""

    tested: Place
    reference: Place

    @classmethod
    def here(cls) -> Places | None:
        """The GPU and the CPU of this process; None where there is no GPU."""
        gpu = mx.Device(mx.gpu)
        return cls(gpu, mx.Device(mx.cpu)) if mx.is_available(gpu) else None


class Stage(NamedTuple):
    """A part of a step."""

    name: str
    run: Callable[[], dict[str, mx.array]]  # builds results from fixed inputs, lazily, on the default stream
    judge: Judge | None = None  # where equality is too much to ask; computes in the second place


def compare(stage: Stage, places: Places | None, tolerance: float, advice: str = REPORT) -> Check:
    """Runs a stage in both places.

    Args:
        tolerance: how far numbers may be apart, relative to the largest of the array.
        advice: what to do if they are further apart.

    Returns:
        A check whose figures have the `difference` that was found.
    """
    if places is None:
        return Check(stage.name, NOT_MADE, NO_GPU)
    try:
        expected = run_in(places.reference, stage, compiled=False)
    except Exception as error:  # whatever MLX's backend or a model's own code says
        return Check(stage.name, NOT_MADE, f"the CPU cannot run it: {type(error).__name__}: {one_line(error)}")
    try:
        found = run_in(places.tested, stage)
    except Exception as error:
        return Check(stage.name, FAILED, f"does not run: {type(error).__name__}: {one_line(error)}", advice)
    worst, problem = difference(found, expected, tolerance)
    if stage.judge is not None:
        with mx.stream(places.reference):
            problem = stage.judge(found, expected, tolerance)
    figures = {"difference": worst, "tolerance": tolerance}
    fine = f"apart by {worst:.1e} at most" if any(map(_is_float, found.values())) else "equal"
    return Check(stage.name, FAILED if problem else OK, problem or fine, advice, figures)


def run_in(place: Place, stage: Stage, compiled: bool = True) -> Outputs:
    """A stage's results, computed in one place.

    Args:
        compiled: whether `mx.compile` counts; on the CPU it needs a C++ compiler, which not every machine has.
    """
    with contextlib.nullcontext() if compiled else _uncompiled(), mx.stream(place):
        outputs = stage.run()
        for name, x in outputs.items():
            outputs[name] = x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x
        mx.eval(outputs)
    return {name: np.array(array) for name, array in outputs.items()}


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    mx.disable_compile()
    try:
        yield
    finally:
        if "MLX_DISABLE_COMPILE" not in os.environ:  # the user's own wish, which enabling would override
            mx.enable_compile()


def difference(found: Outputs, expected: Outputs, tolerance: float) -> tuple[float, str]:
    """The largest relative difference of two results, and what is wrong with the first, if anything."""
    worst, problems = 0.0, []
    if found.keys() != expected.keys():
        return float("inf"), f"results are {', '.join(found)}, expected {', '.join(expected)}"
    for name, right in expected.items():
        mine = found[name]
        if mine.shape != right.shape:
            problems.append(f"{name}: shape {mine.shape}, expected {right.shape}")
        elif _is_float(right):
            apart = _apart(mine, right)
            worst = max(worst, apart)
            if not apart <= tolerance:
                problems.append(f"{name}: apart by {apart:.2g} of the largest value, expected {tolerance:.2g} at most")
        elif wrong := int((mine != right).sum()):
            problems.append(f"{name}: {wrong} of {right.size} differ")
    return worst, "; ".join(problems)


def _is_float(array: np.ndarray) -> bool:
    return np.issubdtype(array.dtype, np.floating)


def _apart(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest finite value; infinite where only one of two values is finite."""
    with np.errstate(invalid="ignore"):
        same = (found == expected) | (np.isnan(found) & np.isnan(expected))
        apart = np.where(same, 0.0, np.abs(found - expected))
    apart = np.where(np.isnan(apart), np.inf, apart)
    size = np.abs(expected[np.isfinite(expected)]).max(initial=1e-6)
    value: Any = apart.max(initial=0.0) / size
    return float(value)
