"""Takes tokens out of a recurrent drafter's output vocabulary; the rows of those that stay are unchanged.

Knows nothing of text.
"""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np

from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.drafting.redrafter import RecurrentDrafter
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.weights import take_weights


def with_most_frequent(drafter: Drafter, counts: np.ndarray, size: int, name: str) -> RecurrentDrafter:
    """The drafter with the `size` tokens alone that are counted most often, of those that it can draft.

    Args:
        drafter: loses its weights to the new one.
        counts: (vocab_size,) of each token; of equal ones those of lower id stay.
        name: of the drafter, for messages.

    Raises:
        UserError: heads of another kind, or a drafter that can draft no more tokens than that.
    """
    if not isinstance(drafter, RecurrentDrafter):
        raise UserError(f"--draft-vocab-size: {name} is no ReDrafter head, which alone can lose tokens")
    if size >= drafter.config.scored:
        expected = f"expected fewer than the {drafter.config.scored} that {name} drafts"
        raise UserError(f"--draft-vocab-size is {size}, {expected}")
    weights = take_weights(drafter)
    known = np.array(weights.get("vocab_map", mx.arange(drafter.config.vocab_size)))
    places = np.sort(np.argsort(-counts[known], kind="stable")[:size])
    for tensor in [tensor for tensor in weights if tensor.startswith("lm_head.")]:
        weights[tensor] = weights[tensor][mx.array(places)]
    weights["vocab_map"] = mx.array(known[places].astype(np.int32))
    return RecurrentDrafter(dataclasses.replace(drafter.config, draft_vocab_size=size)).fill(weights, name)
