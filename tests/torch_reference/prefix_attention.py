"""A few transformer layers over committed tokens (arXiv 2402.05109, section 4.2), row by row."""

from __future__ import annotations

import torch
from torch import nn


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Layer(nn.Module):
    """Each row attends to itself and the rows before it inside a window, then passes an MLP; both are added to it."""

    def __init__(self, size: int, window: int, heads: int):
        super().__init__()
        self.window, self.heads, self.width = window, heads, size // heads
        self.query, self.key, self.value, self.attended = (linear(size, size) for _ in range(4))
        self.gate, self.up, self.down = linear(size, 2 * size), linear(size, 2 * size), linear(2 * size, size)
        self.norms = nn.ModuleList([nn.RMSNorm(size, eps=1e-6) for _ in range(2)])

    def turned(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """RoPE with base 10000 on (heads, width): the first half of the dimensions is paired with the second."""
        half = self.width // 2
        angle = position * 10000.0 ** (-torch.arange(half, device=x.device) / half)
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], dim=-1
        )

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        keys, values, found = [], [], []
        for j, row in enumerate(self.norms[0](rows)):
            keys.append(self.turned(self.key(row).view(self.heads, self.width), j))
            values.append(self.value(row).view(self.heads, self.width))
            query = self.turned(self.query(row).view(self.heads, self.width), j)
            near = slice(max(0, j + 1 - self.window), j + 1)
            scores = torch.einsum("hw,thw->ht", query, torch.stack(keys[near])) / self.width**0.5
            mixed = torch.einsum("ht,thw->hw", torch.softmax(scores, dim=-1), torch.stack(values[near]))
            x = rows[j] + self.attended(mixed.reshape(-1))
            y = self.norms[1](x)
            found.append(x + self.down(nn.functional.silu(self.gate(y)) * self.up(y)))
        return torch.stack(found)


class PrefixAttention(nn.Module):
    """Row j reads the context h_j and e(x_{j+1}), and passes the layers."""

    def __init__(
        self, context_size: int, hidden_size: int, exit_dim: int, window: int, heads: int = 1, layers: int = 1
    ):
        super().__init__()
        self.input_context, self.input_token = linear(context_size, hidden_size), linear(hidden_size, hidden_size)
        self.layers = nn.ModuleList([Layer(hidden_size, window, heads) for _ in range(layers)])
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.output = linear(hidden_size, exit_dim)

    def forward(self, contexts: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """(T, exit_dim) from T contexts (T, context_size) and the embeddings (T, hidden_size) of the tokens after."""
        rows = self.input_context(contexts) + self.input_token(embeddings)
        for layer in self.layers:
            rows = layer(rows)
        found: torch.Tensor = self.output(self.norm(rows))
        return found


_NAMES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attended": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norms.0": "input_layernorm",
    "norms.1": "post_attention_layernorm",
}


def our_name(name: str) -> str:
    """What a weight of this module is called in the package."""
    if not name.startswith("layers."):
        return name
    layers, number, inner = name.removesuffix(".weight").split(".", 2)
    return f"{layers}.{number}.{_NAMES[inner]}.weight"
