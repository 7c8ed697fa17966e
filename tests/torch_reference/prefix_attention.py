"""One transformer layer over committed tokens (arXiv 2402.05109, section 4.2), row by row."""

from __future__ import annotations

import torch
from torch import nn


class PrefixAttention(nn.Module):
    """Row j reads the context h_j and e(x_{j+1}), and attends to itself and the rows before it inside a window."""

    def __init__(self, context_size: int, hidden_size: int, exit_dim: int, window: int, heads: int = 1):
        super().__init__()
        self.window, self.heads, self.width = window, heads, hidden_size // heads

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        self.input_context, self.input_token = linear(context_size, hidden_size), linear(hidden_size, hidden_size)
        self.query, self.key, self.value, self.attended = (linear(hidden_size, hidden_size) for _ in range(4))
        self.gate, self.up = linear(hidden_size, 2 * hidden_size), linear(hidden_size, 2 * hidden_size)
        self.down = linear(2 * hidden_size, hidden_size)
        self.norms = nn.ModuleList([nn.RMSNorm(hidden_size, eps=1e-6) for _ in range(3)])
        self.output = linear(hidden_size, exit_dim)

    def turned(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """RoPE with base 10000 on (heads, width): the first half of the dimensions is paired with the second."""
        half = self.width // 2
        angle = position * 10000.0 ** (-torch.arange(half, device=x.device) / half)
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], dim=-1
        )

    def forward(self, contexts: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """(T, exit_dim) from T contexts (T, context_size) and the embeddings (T, hidden_size) of the tokens after."""
        rows = self.input_context(contexts) + self.input_token(embeddings)
        normed = self.norms[0](rows)
        keys, values, found = [], [], []
        for j, row in enumerate(normed):
            keys.append(self.turned(self.key(row).view(self.heads, self.width), j))
            values.append(self.value(row).view(self.heads, self.width))
            query = self.turned(self.query(row).view(self.heads, self.width), j)
            near = slice(max(0, j + 1 - self.window), j + 1)
            scores = torch.einsum("hw,thw->ht", query, torch.stack(keys[near])) / self.width**0.5
            mixed = torch.einsum("ht,thw->hw", torch.softmax(scores, dim=-1), torch.stack(values[near]))
            x = rows[j] + self.attended(mixed.reshape(-1))
            y = self.norms[1](x)
            x = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
            found.append(self.output(self.norms[2](x)))
        return torch.stack(found)


NAMES = {
    "input_context": "input_context",
    "input_token": "input_token",
    "query": "layer.self_attn.q_proj",
    "key": "layer.self_attn.k_proj",
    "value": "layer.self_attn.v_proj",
    "attended": "layer.self_attn.o_proj",
    "gate": "layer.mlp.gate_proj",
    "up": "layer.mlp.up_proj",
    "down": "layer.mlp.down_proj",
    "norms.0": "layer.input_layernorm",
    "norms.1": "layer.post_attention_layernorm",
    "norms.2": "norm",
    "output": "output",
}
