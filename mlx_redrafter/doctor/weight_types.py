"""The types of weights that texts are compared in, and whether a pair can have them here.

Knows nothing of texts.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.system.device import memory_bytes, on_cpu
from mlx_redrafter.system.weights import weights
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import is_quantized
from mlx_redrafter.text.loading import load

Pair = tuple[nn.Module, Drafter, Any]
BITS, GROUP_SIZE = 4, 64
ROOM = 0.7  # of the memory that a target may take here


class Variant(NamedTuple):
    """A pair with weights of one type."""

    name: str
    load: Callable[[], Pair]
    exact: bool  # whether texts promise to be equal
    why_not: str = ""  # why it cannot be had here


def variants(args: argparse.Namespace, model: nn.Module) -> list[Variant]:
    """float32, bfloat16 and 4-bit; a target of which only one form is asked for comes as it is.

    Args:
        args: flags that name a pair.
        model: its target as they load it.
    """
    dtype, quantized = Target.of(model).dtype, is_quantized(model)
    if quantized or args.dtype is not None:
        name = "quantised, " * quantized + str(dtype).removeprefix("mlx.core.")
        return [Variant(name, functools.partial(_load, args, args.dtype), dtype == mx.float32 and not quantized)]
    count, room = weights(model)[0], ROOM * memory_bytes()

    def variant(name: str, dtype: str, exact: bool = False, bits: int | None = None) -> Variant:
        needed = count * (4 if dtype == "float32" else 2)  # it is read in full before it is quantised
        why_not = f"needs {needed / 1e9:.1f} GB of the {room / 1e9:.1f} that may be taken" if needed > room else ""
        return Variant(name, functools.partial(_load, args, dtype, bits), exact, why_not)

    # Quantised products on the CPU add up in the type of the activations, where bfloat16 is too coarse.
    base = "float32" if on_cpu() else "bfloat16"
    return [
        variant("float32", "float32", exact=True),
        variant("bfloat16", "bfloat16"),
        variant(f"{BITS}-bit", base, bits=BITS),
    ]


def _load(args: argparse.Namespace, dtype: str | None, bits: int | None = None) -> Pair:
    """The pair that flags name, its target quantised as mlx-lm does where bits are given."""
    options = {"adapter_path": args.adapter_path, "trust_remote_code": args.trust_remote_code}
    model, drafter, tokenizer = load(args.model, args.draft, gguf=args.gguf, dtype=dtype, **options)
    assert drafter is not None  # the command has seen to that
    if bits is not None:
        nn.quantize(model, GROUP_SIZE, bits, class_predicate=_fits)
        mx.eval(model.parameters())
        check_pair(Target.of(model), drafter)  # a drafter that shares the output layer shares the new one
    return model, drafter, tokenizer


def _fits(_: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % GROUP_SIZE == 0
