"""Splits a model over several processes, and tells whether it is. Knows nothing of where its weights come from.

mlx-lm splits a model in two ways: `shard` gives every process a part of each layer, `pipeline` some of the layers.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.system.ranks import Ranks, all_ranks, number_of_ranks

TENSOR, PIPELINE = "tensor", "pipeline"


def way(pipeline: bool) -> str | None:
    """How the processes divide models, by whether they are to be a pipeline; None where there is one process."""
    return None if number_of_ranks() == 1 else PIPELINE if pipeline else TENSOR


def divide(model: nn.Module, how: str, name: str) -> None:
    """Leaves this process its part of a model whose weights are lazy, and loads that part.

    Args:
        how: TENSOR or PIPELINE.
        name: of the model, for people.

    Raises:
        UserError: mlx-lm cannot split such a model in this way.
    """
    ranks, body, kind = all_ranks(), getattr(model, "model", None), getattr(model, "model_type", "?")
    ways = {TENSOR: getattr(model, "shard", None), PIPELINE: getattr(body, "pipeline", None)}
    if (split := ways[how]) is None:
        others = [word for way, word in ((TENSOR, "without --pipeline"), (PIPELINE, "with --pipeline")) if ways[way]]
        what = f"mlx-lm can, {others[0]}" if others else "mlx-lm can in no way"
        raise UserError(f"--model {name}: a model of type {kind!r} cannot be split like this; {what}")
    try:
        split(ranks.group)
    except ValueError as error:
        raise UserError(f"--model {name}: cannot be split over {ranks.size} processes: {one_line(error)}") from error
    mx.eval(model.parameters())
    mx.eval(ranks.agree(mx.array([0])))  # together from here on: a GPU does not wait long for what comes from others


def ranks_of(model: nn.Module) -> Ranks | None:
    """The processes that a model is split over; None where this one has all of it."""
    if number_of_ranks() == 1:
        return None
    sizes = {number_of_ranks()} if is_pipelined(model) else {size for m in model.modules() for size in _sizes(m)}
    if not sizes:
        return None
    if sizes != {number_of_ranks()}:
        raise UserError(f"the model is split over {max(sizes)} processes, expected all {number_of_ranks()}")
    return all_ranks()


def is_pipelined(model: nn.Module) -> bool:
    """Whether this process runs some of the layers only."""
    return any(getattr(module, "pipeline_size", 1) > 1 for module in model.modules())


def _sizes(module: nn.Module) -> list[int]:
    """Of the groups, larger than one, that a module sums over."""
    groups = [value for value in vars(module).values() if isinstance(value, mx.distributed.Group)]
    return [group.size() for group in groups if group.size() > 1]
