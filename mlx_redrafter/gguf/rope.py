"""How a GGUF file scales rotary positions, as mlx-lm's `rope_scaling`."""

from __future__ import annotations

import math
from typing import Any

import gguf
import numpy as np

from mlx_redrafter.errors import UserError
from mlx_redrafter.gguf.file import GGUF

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
FACTOR_TENSORS = (FREQUENCIES, LONG, SHORT)


def rope_scaling(file: GGUF, arch: str, config: dict[str, Any], dims: int) -> dict[str, Any]:
    """The config's fields about scaling; none where positions are not scaled.

    Args:
        config: has rope_theta and max_position_embeddings already.
        dims: dimensions of a head that are rotated.

    Raises:
        UserError: a kind of scaling that is not known here.
    """
    if LONG in file.tensors:
        original = file.get(f"{arch}.rope.scaling.original_context_length", int)
        long, short = _factors(file, LONG, dims), _factors(file, SHORT, dims)
        scaling = {"long_factor": long, "short_factor": short, "original_max_position_embeddings": original}
        return {"rope_scaling": _typed("longrope", scaling), "original_max_position_embeddings": original}
    if FREQUENCIES in file.tensors:
        return {"rope_scaling": _frequencies(_factors(file, FREQUENCIES, dims), config, dims)}
    kind = file.get(f"{arch}.rope.scaling.type", str, "none")
    factor = file.get(f"{arch}.rope.scaling.factor", float, file.get(f"{arch}.rope.scale_linear", float, 1.0))
    if factor in (0.0, 1.0) or (kind == "none" and f"{arch}.rope.scale_linear" not in file.metadata):
        return {}
    if kind in ("linear", "none"):  # before there was a type, there was scale_linear
        return {"rope_scaling": _typed("linear", {"factor": factor})}
    if kind == "yarn":
        context = config["max_position_embeddings"]
        original = file.get(f"{arch}.rope.scaling.original_context_length", int, round(context / factor))
        return {"rope_scaling": _typed("yarn", {"factor": factor, "original_max_position_embeddings": original})}
    raise UserError(f"{file.path}: {arch}.rope.scaling.type is {kind!r}, expected none, linear or yarn")


def _typed(kind: str, scaling: dict[str, Any]) -> dict[str, Any]:
    """With the kind under the newer and the older key: of mlx-lm's models, some know only the older."""
    return {"rope_type": kind, "type": kind} | scaling


def _factors(file: GGUF, name: str, dims: int) -> list[float]:
    tensor = file.tensor(name)
    values = gguf.dequantize(tensor.rows, tensor.type).reshape(-1)
    if len(values) != dims // 2:
        raise UserError(f"{file.path}: tensor {name!r} has {len(values)} numbers, expected {dims // 2}")
    return [float(value) for value in values]


def _frequencies(factors: list[float], config: dict[str, Any], dims: int) -> dict[str, Any]:
    """Divisors of the frequencies, as Llama 3's formula where it yields them, else as they are.

    The formula: a wavelength below original / high is kept, one above original / low divided by the
    factor, and in between goes a straight line in original / wavelength. Two points on the line tell
    original : low : high; they are told only up to a common multiple, so low is 1, as in every Llama.
    """
    divisors = np.array(factors)
    wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(0, dims, 2) / dims)
    factor = _round(divisors.max())
    between = np.flatnonzero((divisors > 1 + 1e-6) & (divisors < factor * (1 - 1e-6)))
    if len(between) >= 2:
        smooth = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(1 / wavelengths[between], smooth, 1)
        if offset < 0:
            high = _round(1 - 1 / offset)
            scaling = {
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": round(slope * (high - 1)),
            }
            if np.allclose(_llama3(wavelengths, **scaling), divisors, rtol=1e-5):
                return _typed("llama3", scaling)
    # With an original context of the whole length, longrope neither chooses nor scales: the factors are all there is.
    context = config["max_position_embeddings"]
    scaling = {"long_factor": factors, "short_factor": factors, "original_max_position_embeddings": context}
    return _typed("longrope", scaling | {"attention_factor": 1.0})


def _llama3(
    wavelengths: np.ndarray,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> np.ndarray:
    """The divisor at each wavelength by Llama 3's formula."""
    place = original_max_position_embeddings / wavelengths
    smooth = np.clip((place - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _round(value: float) -> float:
    return round(float(value), 3)
