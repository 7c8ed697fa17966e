"""The types of weights that texts are compared in, and whether a pair can have them here."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.system.device import on_cpu
from mlx_redrafter.system.weights import weights
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import is_quantized
from mlx_redrafter.text.loading import load

Pair = tuple[nn.Module, Drafter, Any]
BITS, GROUP_SIZE = 4, 64
ROOM = 0.7  # of the memory that a target may take here


@dataclasses.dataclass(frozen=True)
class Variant:
    """A pair with weights of one type.

    Attributes:
        name: for people.
        load: reads the pair.
        exact: texts promise to be equal.
        why_not: why it cannot be had here; empty if it can.
    """

    name: str
    load: Callable[[], Pair]
    exact: bool
    why_not: str = ""


def variants(args: argparse.Namespace, model: nn.Module) -> list[Variant]:
    """float32, bfloat16 and 4-bit; a target of which only one form is asked for comes as it is.

    Args:
        args: flags that name a pair.
        model: its target as they load it.
    """
    dtype = Target.of(model).dtype
    kind = str(dtype).removeprefix("mlx.core.")
    if is_quantized(model) or args.dtype is not None:
        quantized = is_quantized(model)
        name = f"quantised, {kind}" if quantized else kind
        return [Variant(name, lambda: _load(args, args.dtype), exact=dtype == mx.float32 and not quantized)]
    count, room = weights(model)[0], ROOM * _memory()
    # Quantised products on the CPU add up in the type of the activations, where bfloat16 is too coarse.
    base = "float32" if on_cpu() else "bfloat16"
    whole = [
        Variant(name, lambda name=name: _load(args, name), name == "float32", _too_large(count, size, room))  # type: ignore[misc]
        for name, size in (("float32", 4), ("bfloat16", 2))
    ]
    size = 4 if base == "float32" else 2  # it is read in full before it is quantised
    few = Variant(f"{BITS}-bit", lambda: _quantized(_load(args, base)), False, _too_large(count, size, room))
    return [*whole, few]


def _load(args: argparse.Namespace, dtype: str | None) -> Pair:
    options = {"adapter_path": args.adapter_path, "trust_remote_code": args.trust_remote_code}
    model, drafter, tokenizer = load(args.model, args.draft, dtype=dtype, **options)
    assert drafter is not None  # the command has seen to that
    return model, drafter, tokenizer


def _quantized(pair: Pair) -> Pair:
    """Quantises the target as mlx-lm does: every layer that can be, where the group size divides its width."""
    model, drafter, tokenizer = pair

    def fits(_: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP_SIZE == 0

    nn.quantize(model, GROUP_SIZE, BITS, class_predicate=fits)
    mx.eval(model.parameters())
    check_pair(Target.of(model), drafter)  # a drafter that shares the output layer shares the new one
    return model, drafter, tokenizer


def _too_large(weights: int, bytes_each: int, room: float) -> str:
    needed = weights * bytes_each
    return f"needs {needed / 1e9:.1f} GB of the {room / 1e9:.1f} that may be taken" if needed > room else ""


def _memory() -> float:
    """Bytes of the memory that weights lie in."""
    facts = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
        if isinstance(size := facts.get(key), int):
            return float(size)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
