"""Targets and drafters that the PyTorch reference and MLX both hold, for the tests in promises/parity."""

from __future__ import annotations

import ctypes
import pathlib

import mlx_redrafter  # isort: skip # noqa: F401 (before torch and mlx: it puts OpenBLAS in front of MLX's own BLAS)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import torch_reference as reference
from mlx_redrafter.decoding.step import DecodingOptions, prefill
from mlx_redrafter.drafting.redrafter import RecurrentDrafter
from mlx_redrafter.target.cache.kv_cache import KVCache
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import Verifier
from torch_reference.pairs import memorise, mlx_target, to_mlx, to_numpy, torch_drafter, torch_target
from torch_reference.tree import from_paths

VOCAB, HIDDEN = 150, 48
TARGETS = {
    "grouped-tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "biases": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "llama3-rope": {"num_key_value_heads": 1, "tie_word_embeddings": False},
}
# What mlx-lm calls rope_theta and rope_scaling, transformers writes as rope_parameters.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DRAFTERS = {  # exit_dim, num_draft_layers, rnn
    "rnn": (40, 2, True),
    "rnn-wide": (2 * HIDDEN, 1, True),
    "sum": (72, 1, False),
    "sum-wide": (2 * HIDDEN, 3, False),
    "no-blocks": (40, 0, True),
}
SHAPES = [  # W, L, N
    (1, 2, 1),
    (1, 5, 4),
    (2, 4, 3),
    (3, 4, 9),
    (4, 5, 8),
    (6, 4, 7),
    (8, 3, 16),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that share these small products mostly wait for one another: minutes, beside a busy core.

    An OpenBLAS in front of MLX's BLAS multiplies some of PyTorch's matrices too, on threads of its own.
    """
    process = ctypes.CDLL(None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    blas_threads = process.openblas_get_num_threads() if hasattr(process, "openblas_get_num_threads") else None
    if blas_threads:
        process.openblas_set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if blas_threads:
        process.openblas_set_num_threads(blas_threads)


@pytest.fixture(scope="module", params=TARGETS)
def targets(request, tmp_path_factory) -> tuple[LlamaForCausalLM, Verifier]:
    return random_targets(tmp_path_factory.mktemp(request.param), request.param)


def random_targets(folder: pathlib.Path, name: str, layers: int = 2) -> tuple[LlamaForCausalLM, Verifier]:
    """A random Llama, in PyTorch and, through its files, in mlx-lm."""
    torch.manual_seed(1)
    is_llama3 = name == "llama3-rope"
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        # Large enough that attention is far from uniform: a wrong position or mask has to show.
        initializer_range=0.25,
        rope_parameters={"rope_theta": 500.0, **LLAMA3} if is_llama3 else {"rope_theta": 1e4, "rope_type": "default"},
        **TARGETS[name],
    )
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.25)
    model.save_pretrained(folder)
    in_mlx_words = {"rope_theta": 500.0, "rope_scaling": LLAMA3} if is_llama3 else None
    return torch_target(folder), mlx_target(folder, in_mlx_words)


@pytest.fixture(scope="module", params=DRAFTERS)
def drafters(request) -> tuple[reference.Drafter, RecurrentDrafter]:
    drafter = torch_drafter(VOCAB, HIDDEN, *DRAFTERS[request.param])
    return drafter, to_mlx(drafter)


@pytest.fixture(scope="module")
def embedding() -> tuple[torch.nn.Embedding, nn.Embedding]:
    torch.manual_seed(2)
    table = torch.nn.Embedding(VOCAB, HIDDEN).to(reference.DEVICE)
    ours = nn.Embedding(VOCAB, HIDDEN)
    ours.weight = mx.array(to_numpy(table.weight))
    return table, ours


def random_contexts(batch: int) -> tuple[torch.Tensor, list[int]]:
    generator = torch.Generator().manual_seed(3)
    contexts = torch.randn(batch, HIDDEN, generator=generator).to(reference.DEVICE)
    return contexts, torch.randint(VOCAB, (batch,), generator=generator).tolist()


def random_tree(random: np.random.Generator, rows: int, vocab: int) -> reference.Tree:
    paths = [()]
    while len(paths) < rows:
        path = (*paths[random.integers(len(paths))], int(random.integers(vocab)))
        if path not in paths:
            paths.append(path)
    return from_paths(int(random.integers(vocab)), sorted(paths[1:], key=len))


def to_candidate_tree(trees: list[reference.Tree], fillers: tuple[int, ...] = ()) -> CandidateTree:
    """Trees of equally many rows as one batch; `fillers` are tokens of rows behind them that do not count."""
    tokens = mx.array([[*t.tokens, *fillers] for t in trees])
    parents = mx.array([t.parents + [0] * len(fillers) for t in trees])
    valid = mx.broadcast_to(mx.arange(tokens.shape[1]) < len(trees[0].tokens), tokens.shape)
    return CandidateTree.from_parents(tokens, parents, max(max(t.depths) for t in trees), valid)


def read_prompts(
    verifier: Verifier, prompts: list[list[int]], layers: tuple[int, ...] = ()
) -> tuple[KVCache, mx.array, mx.array]:
    """A cache that holds the prompts and is ready for trees; hidden states and logits at their ends."""
    cache = verifier.make_cache()
    options = DecodingOptions(prefill_step_size=5)
    hidden, logits = prefill(verifier.target, mx.array(prompts), cache.layers, options, layers)
    cache.begin_trees(len(prompts))
    return cache, hidden, logits


def memorised(
    model: LlamaForCausalLM,
    prompt: list[int],
    text: list[int],
    exit_dim: int,
    rnn: bool,
    updates: int,
    layers: tuple[int, ...] = (),
) -> tuple[reference.Drafter, RecurrentDrafter]:
    config = model.config
    drafter = torch_drafter(config.vocab_size, config.hidden_size, exit_dim, 1, rnn, layers, spread=0.5)
    memorise(drafter, model, prompt + text, updates)
    return drafter, to_mlx(drafter)
