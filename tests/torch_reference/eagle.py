"""An EAGLE-3 head (arXiv 2503.01840), row by row; its modules have the names that published checkpoints have."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Attention(nn.Module):
    """Grouped attention over pairs of an embedding and a feature, each `size` wide."""

    def __init__(self, size: int, heads: int, groups: int):
        super().__init__()
        self.heads, self.groups, self.width = heads, groups, size // heads

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        self.q_proj = linear(2 * size, size)
        self.k_proj, self.v_proj = (linear(2 * size, groups * self.width) for _ in range(2))
        self.o_proj = linear(size, size)


class Mlp(nn.Module):
    def __init__(self, size: int, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(size, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, size: int, inner: int, heads: int, groups: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(size, heads, groups), Mlp(size, inner)
        self.hidden_norm, self.input_layernorm, self.post_attention_layernorm = (
            nn.RMSNorm(size, eps=1e-5) for _ in range(3)
        )


class Eagle(nn.Module):
    """The head.

    Args:
        target_size: the target's hidden size, of which it reads three at once.
        size, inner, heads, groups: of its layer.
        vocab: of the target; `drafted` of its tokens have scores.
        norm_before_residual: as speculators' heads have it.
    """

    def __init__(
        self,
        target_size: int,
        size: int,
        vocab: int,
        drafted: int,
        inner: int = 40,
        heads: int = 4,
        groups: int = 2,
        norm_before_residual: bool = False,
    ):
        super().__init__()
        self.norm_before_residual, self.base = norm_before_residual, 10000.0
        self.embed_tokens = nn.Embedding(vocab, size)
        self.fc = nn.Linear(3 * target_size, size, bias=False)
        self.midlayer = Layer(size, inner, heads, groups)
        self.norm = nn.RMSNorm(size, eps=1e-5)
        self.lm_head = nn.Linear(size, drafted, bias=False)
        ids = torch.randperm(vocab)[:drafted].sort().values
        self.register_buffer("d2t", ids - torch.arange(drafted))
        self.register_buffer("t2d", torch.isin(torch.arange(vocab), ids))
        for parameter in self.parameters():  # norms begin as ones, and small weights hide mistakes
            parameter.data = 1.5 * parameter.data + 0.1 * torch.randn_like(parameter)

    def turned(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """RoPE on (heads, width): the first half of the dimensions is paired with the second."""
        half = x.shape[-1] // 2
        angle = position * self.base ** (-torch.arange(half, device=x.device) / half)
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], dim=-1
        )

    def outputs(self, contexts: torch.Tensor, tokens: list[int]) -> list[torch.Tensor]:
        """Every row's output; rows beyond the contexts (T, 3 * target_size) read the output of the row before."""
        attention, layer = self.midlayer.self_attn, self.midlayer
        keys, values, found = [], [], []
        for j, token in enumerate(tokens):
            feature = self.fc(contexts[j]) if j < len(contexts) else found[-1]
            normed = layer.hidden_norm(feature)
            x = torch.cat([layer.input_layernorm(self.embed_tokens.weight[token]), normed])
            query, key, value = (p(x) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            keys.append(self.turned(key.view(attention.groups, -1), j))
            values.append(value.view(attention.groups, -1))
            query, share = self.turned(query.view(attention.heads, -1), j), attention.heads // attention.groups
            k, v = (torch.stack(rows).repeat_interleave(share, dim=1) for rows in (keys, values))
            weights = torch.softmax(torch.einsum("hw,thw->ht", query, k) / attention.width**0.5, dim=-1)
            attended = attention.o_proj(torch.einsum("ht,thw->hw", weights, v).reshape(-1))
            hidden = (normed if self.norm_before_residual else feature) + attended
            found.append(hidden + layer.mlp(layer.post_attention_layernorm(hidden)))
        return found

    @torch.no_grad()
    def logits(self, contexts: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        """(drafted,) scores behind the last row."""
        return self.lm_head(self.norm(self.outputs(contexts, tokens)[-1]))

    def beams(self, contexts: torch.Tensor, tokens: list[int], width: int, length: int) -> list[list[tuple[int, ...]]]:
        """The beams after 1, 2, ..., length - 1 drafted tokens, each list with the most probable first."""
        ids = (torch.arange(len(self.d2t)) + self.d2t).tolist()
        return beams_of(lambda path: self.logits(contexts, [*tokens, *path]), ids, width, length)


def beams_of(
    logits: Callable[[tuple[int, ...]], torch.Tensor], ids: list[int] | None, width: int, length: int
) -> list[list[tuple[int, ...]]]:
    """Beams of a head that gives the logits behind a path; `ids` are the tokens they are for, None for all."""
    beam: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    found = []
    for _ in range(length - 1):
        children = []
        for path, log_prob in beam:
            scores = torch.log_softmax(logits(path), dim=-1).tolist()
            children += [((*path, ids[i] if ids else i), log_prob + score) for i, score in enumerate(scores)]
        beam = sorted(children, key=lambda child: -child[1])[:width]
        found.append([path for path, _ in beam])
    return found
