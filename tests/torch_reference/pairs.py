"""The same model on both sides: targets and drafters in PyTorch and, from the same weights, in MLX."""

from __future__ import annotations

import pathlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from transformers import LlamaForCausalLM

from mlx_redrafter.drafting.redrafter import DrafterConfig, RecurrentDrafter
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import Verifier

from . import DEVICE, Drafter
from .verification import read_sequence


def torch_target(folder: pathlib.Path) -> LlamaForCausalLM:
    """A directory's Llama in float32, with the attention that takes any mask."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval().to(DEVICE)


def mlx_target(folder: pathlib.Path, config: dict | None = None) -> Verifier:
    """The same in mlx-lm; `config` adds to, or overrules, config.json."""
    model, _ = load_model(folder, model_config=config)
    model.set_dtype(mx.float32)
    return verifier_of(model)


def torch_drafter(
    vocab: int,
    hidden: int,
    exit_dim: int,
    blocks: int,
    rnn: bool,
    layers: tuple[int, ...] = (),
    spread: float = 1.0,
) -> Drafter:
    """Random weights of a size that keeps log-probabilities apart and makes every bias count."""
    torch.manual_seed(exit_dim + blocks)
    drafter = Drafter(vocab, hidden, exit_dim, blocks, rnn, layers)
    for name, weight in drafter.named_parameters():
        scale = 0.5 if name.endswith("bias") else weight.shape[1] ** -0.5
        torch.nn.init.normal_(weight, std=spread * scale)
    return drafter.to(DEVICE)


def renamed(drafter: Drafter, h_first: bool = True) -> dict[str, mx.array]:
    """Apple's tensors under the names of RecurrentDrafter; input_proj's left columns read h, its right ones s."""
    weights = {}
    for name, tensor in drafter.state_dict().items():
        value = mx.array(tensor.cpu().numpy())
        if name == "input_proj.weight":
            left, right = mx.split(value, [value.shape[1] - drafter.hidden_size], axis=1)
            context, state = (left, right) if h_first else (right, left)
            weights |= {"input_proj_context.weight": context, "input_proj_state.weight": state}
        elif name == "input_proj.bias":
            weights["input_proj_context.bias"] = value
        elif name == f"lm_head.{drafter.num_draft_layers}.weight":
            weights["lm_head.weight"] = value
        else:
            weights[name.replace("lm_head.", "blocks.")] = value
    return weights


def to_mlx(drafter: Drafter) -> RecurrentDrafter:
    """The MLX drafter with a reference drafter's weights."""
    config = DrafterConfig(
        *(drafter.vocab_size, drafter.hidden_size, drafter.exit_dim, drafter.num_draft_layers, drafter.rnn),
        context_layers=drafter.layers,
    )
    return RecurrentDrafter(config).fill(renamed(drafter), "the reference")


def to_torch(drafter: RecurrentDrafter) -> Drafter:
    """The way back, for a drafter that exists on the MLX side only; quantised matrices are unpacked."""
    config = drafter.config
    weights = {}
    for path, module in drafter.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            packed = module.weight, module.scales, module.biases, module.group_size, module.bits
            weights[f"{path}.weight"] = mx.dequantize(*packed)
    plain = {name: value for name, value in tree_flatten(drafter.parameters()) if name.endswith((".weight", ".bias"))}
    weights = {name: torch.from_numpy(np.array(value.astype(mx.float32))) for name, value in (plain | weights).items()}
    if config.has_input_proj:
        halves = [weights.pop(f"input_proj_{half}.weight") for half in ("context", "state")]
        weights["input_proj.weight"] = torch.cat(halves, dim=1)
        weights["input_proj.bias"] = weights.pop("input_proj_context.bias")
    weights[f"lm_head.{config.num_draft_layers}.weight"] = weights.pop("lm_head.weight")
    sizes = config.vocab_size, config.hidden_size, config.exit_dim, config.num_draft_layers
    result = Drafter(*sizes, config.rnn, config.context_layers)
    result.load_state_dict({name.replace("blocks.", "lm_head."): value for name, value in weights.items()})
    return result.to(DEVICE)


def memorise(drafter: Drafter, model: LlamaForCausalLM, text: list[int], updates: int) -> None:
    """Trains briefly on what the target wrote, so that drafts are accepted: some, not all.

    Each position t of the text gives one context h_t; the tokens t + 1, t + 2, ... are read,
    and the one after each is to be predicted.
    """
    hidden, _ = read_sequence(model, text, drafter.layers)
    depth = 4
    starts = torch.arange(len(text) - depth - 1)
    tokens = torch.tensor(text)
    embeddings = model.get_input_embeddings()(tokens.to(hidden.device)).detach()
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    for _ in range(updates):
        state, loss = drafter.first_state(embeddings[starts + 1]), torch.zeros((), device=hidden.device)
        for k in range(1, depth):
            state = drafter.advance(embeddings[starts + k], state)
            wanted = tokens[starts + k + 1].to(hidden.device)
            loss = loss + torch.nn.functional.cross_entropy(drafter.logits(hidden[starts], state), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def to_numpy(x) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.array(x)


def worst(ours: mx.array, theirs: torch.Tensor) -> float:
    """The largest absolute difference of two arrays of one shape."""
    assert tuple(ours.shape) == tuple(theirs.shape)
    return float(np.abs(to_numpy(ours) - to_numpy(theirs)).max())
