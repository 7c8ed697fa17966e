"""A Hugging Face Llama over a sequence, or over a sequence with a tree behind it. Everything is computed anew."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

from .tree import Tree


@torch.no_grad()
def read(
    model: LlamaForCausalLM,
    tokens: list[int],
    positions: list[int],
    allowed: list[list[bool]],
    layers: tuple[int, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass over T tokens with an explicit position for each and an explicit mask.

    Args:
        model: in float32, with attn_implementation "eager".
        tokens, positions: T each.
        allowed: T x T; allowed[i][j] says whether row i may look at row j.
        layers: see `Drafter`.

    Returns:
        hidden (T, hidden_size), after the final norm, or states after some layers side by side, those
        before the last one divided by their root mean square; and logits (T, vocab_size).
    """
    device = model.device
    forbidden = ~torch.tensor(allowed, device=device)
    mask = torch.zeros(forbidden.shape, device=device).masked_fill(forbidden, torch.finfo(torch.float32).min)
    output = model.model(
        input_ids=torch.tensor([tokens], device=device),
        position_ids=torch.tensor([positions], device=device),
        attention_mask=mask[None, None],
        use_cache=False,
        output_hidden_states=True,
    )
    last, parts = output.last_hidden_state[0], []
    for layer in layers:
        state = output.hidden_states[layer][0]
        inner = layer < model.config.num_hidden_layers
        parts.append(state / (state.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() if inner else last)
    return torch.cat(parts, dim=-1) if layers else last, model.lm_head(last)


def read_sequence(
    model: LlamaForCausalLM, tokens: list[int], layers: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `read`, each token looking at those before it and at itself."""
    count = len(tokens)
    return read(model, tokens, list(range(count)), [[j <= i for j in range(count)] for i in range(count)], layers)


def verify(
    model: LlamaForCausalLM, committed: list[int], tree: Tree, layers: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads a tree behind the tokens it continues.

    Args:
        model: the target.
        committed: tokens before the root.
        tree: 1 + N rows.
        layers: see `Drafter`.

    Returns:
        hidden (1 + N, width of the layers) and logits (1 + N, vocab_size) of the tree's rows.
    """
    before, rows = len(committed), len(tree.tokens)
    positions = [*range(before), *(before + depth for depth in tree.depths)]
    allowed = [[j <= i for j in range(before)] + [False] * rows for i in range(before)]
    allowed += [[True] * before + tree.ancestors[row] for row in range(rows)]
    hidden, logits = read(model, committed + tree.tokens, positions, allowed, layers)
    return hidden[before:], logits[before:]
