"""The recurrent head, equation by equation (arXiv 2403.09919, section 3.1)."""

from __future__ import annotations

import torch
from torch import nn


class ResidualBlock(nn.Module):
    """z + SiLU(A z + a)."""

    def __init__(self, dims: int):
        super().__init__()
        self.linear = nn.Linear(dims, dims)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + nn.functional.silu(self.linear(z))


class Drafter(nn.Module):
    """The head with the tensor names of Apple's checkpoints.

    Args:
        vocab_size: tokens that are scored.
        hidden_size: width of the context h and of the state s.
        exit_dim: width of the residual blocks; there is an input projection only if it
            is not 2 * hidden_size, or there are several layers.
        num_draft_layers: residual blocks, 0 or more.
        rnn: the gated recurrence, or (False) the sum of embeddings.
        layers: of the target, after which hidden states are read: the context is all of them
            side by side. None: the last one alone.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        exit_dim: int,
        num_draft_layers: int,
        rnn: bool = True,
        layers: tuple[int, ...] = (),
    ):
        super().__init__()
        self.vocab_size, self.hidden_size, self.exit_dim = vocab_size, hidden_size, exit_dim
        self.num_draft_layers, self.rnn, self.layers = num_draft_layers, rnn, layers
        self.projects = exit_dim != 2 * hidden_size or len(layers) > 1
        if self.projects:
            self.input_proj = nn.Linear((max(1, len(layers)) + 1) * hidden_size, exit_dim)
        # Blocks are lm_head.{i}.linear, and the output layer is the last of the same list.
        blocks = [ResidualBlock(exit_dim) for _ in range(num_draft_layers)]
        self.lm_head = nn.ModuleList([*blocks, nn.Linear(exit_dim, vocab_size, bias=False)])
        if rnn:
            self.rnn_u = nn.Linear(hidden_size, hidden_size)
            self.rnn_w = nn.Linear(hidden_size, hidden_size, bias=False)

    def first_state(self, embedding: torch.Tensor) -> torch.Tensor:
        """s_0 = 0, of the shape of the embeddings (..., hidden_size)."""
        return torch.zeros_like(embedding)

    def advance(self, embedding: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """s_k from e(x_k) and s_{k-1}, all (..., hidden_size)."""
        if self.rnn:
            return nn.functional.silu(self.rnn_w(embedding) + self.rnn_u(state))
        return embedding + state

    def logits(self, context: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """(..., vocab_size) from the context h, as wide as its layers, and the state s_k, (..., hidden_size)."""
        z = torch.cat([context, state], dim=-1)
        if self.projects:
            z = self.input_proj(z)
        for layer in self.lm_head:
            z = layer(z)
        return z

    def log_probs(self, context: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """(..., vocab_size), over the whole vocabulary: nothing is cut off before the softmax."""
        return torch.log_softmax(self.logits(context, state).float(), dim=-1)
