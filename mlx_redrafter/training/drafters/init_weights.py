"""Makes the recurrent drafter that training starts from: near the target's own scores, or random.

Knows nothing of text.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_redrafter.drafting.pairing import tie
from mlx_redrafter.drafting.redrafter import DrafterConfig, RecurrentDrafter
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.output_layer import output_matrix

FROM_TARGET, RANDOM, TIED = "target", "random", "tied"
OUTPUTS = (FROM_TARGET, RANDOM, TIED)


def new_drafter(
    target: Target,
    config: DrafterConfig,
    seed: int,
    output: str = FROM_TARGET,
    vocab_map: np.ndarray | None = None,
    text: np.ndarray | None = None,
) -> RecurrentDrafter:
    """A drafter to start training from.

    With "target" the output layer begins as the target's, and the context passes through
    to it unchanged, so the head starts near the target's own scores and has only the next
    steps to learn. Where exit_dim is smaller than hidden_size, both begin as the best
    approximation of that rank to the target's layer (the leading singular vectors). Of a
    context of several layers the last hidden state passes through, and the others say nothing
    yet; where it is not among them, the projection begins at random.

    Args:
        output: "target", "random", or "tied" (not trained, the target's own), as config.tie_output says.
        vocab_map: (config.draft_vocab_size,) the target's ids of the draft vocabulary.
        text: (B, T) token ids, by which a norm before the output layer learns how large hidden states are.
    """
    mx.random.seed(seed)
    drafter = RecurrentDrafter(config)
    if vocab_map is not None:
        drafter.vocab_map = mx.array(vocab_map, mx.int32)
    tie(drafter, target)
    if output == FROM_TARGET:
        matrix = output_matrix(target)
        if vocab_map is not None:
            matrix = matrix[vocab_map]
        rows, passed = _truncated(matrix, config.exit_dim)
        _pass(drafter, target, passed)
        drafter.lm_head.weight = _placed(drafter.lm_head.weight, rows)
    elif output == TIED:
        _pass(drafter, target, np.eye(config.hidden_size, dtype=np.float32))
    if config.prefix_window:  # says nothing yet
        drafter.prefix.output.weight = mx.zeros_like(drafter.prefix.output.weight)
    if config.output_norm and text is not None:  # hidden states that pass through come out as they were
        drafter.output_norm.weight = hidden_rms(target, text) * mx.ones_like(drafter.output_norm.weight)
    mx.eval(drafter.parameters())
    return drafter


def hidden_rms(target: Target, text: np.ndarray) -> mx.array:
    """How large the target's last hidden states are, the root of the mean of their squares; text as above."""
    hidden, _ = target.forward(mx.array(text), [None] * len(target.model.layers))
    assert hidden is not None  # the command refuses targets that give none
    return mx.sqrt(mx.mean(mx.square(hidden.astype(mx.float32))))


def _pass(drafter: RecurrentDrafter, target: Target, passed: np.ndarray) -> None:
    """Lets the projection, where there is one, begin with this (r, hidden) part for the last hidden state."""
    config, layers = drafter.config, drafter.context_layers
    if not config.has_input_proj or (layers and layers[-1] != target.num_layers):
        return
    weight = np.zeros((config.exit_dim, config.context_size), np.float32)
    weight[: passed.shape[0], -config.hidden_size :] = passed  # layers rise: the last hidden state comes last
    drafter.input_proj_context.weight = mx.array(weight)


def _truncated(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors (n, r) and (r, hidden) of the best approximation to an (n, hidden) matrix, r at most its rank."""
    hidden = matrix.shape[1]
    if rank >= hidden:
        return matrix, np.eye(hidden, dtype=np.float32)
    _, vectors = np.linalg.eigh(matrix.T @ matrix)  # rising eigenvalues
    leading = vectors[:, ::-1][:, :rank]
    return matrix @ leading, leading.T


def _placed(weight: mx.array, part: np.ndarray) -> mx.array:
    """The weight with `part` in its upper left corner."""
    rows, columns = part.shape
    placed = np.array(weight)
    if rows < weight.shape[0]:  # rows beyond it would add what the part does not have
        placed[rows:] = 0
    placed[:rows, :columns] = part
    return mx.array(placed)
