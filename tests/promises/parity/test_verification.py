"""Verification and acceptance on MLX against the PyTorch reference: same rows, same paths."""

from __future__ import annotations

import mlx_redrafter  # isort: skip # noqa: F401 (before torch and mlx: it puts OpenBLAS in front of MLX's own BLAS)

import mlx.core as mx
import numpy as np
import pytest

from mlx_redrafter.target.verification import accept

torch = pytest.importorskip("torch", reason="the PyTorch reference needs torch")

import torch_reference as reference  # noqa: E402
from torch_reference.cases import VOCAB, random_tree, read_prompts, to_candidate_tree  # noqa: E402
from torch_reference.pairs import to_numpy, worst  # noqa: E402
from torch_reference.tree import from_paths  # noqa: E402


def test_reference_reads_a_tree_like_its_paths(targets):
    """If this fails, the reference's own mask or positions are wrong and no other test here means anything."""
    model, _ = targets
    tree = from_paths(7, [(1,), (2,), (1, 3), (2, 3), (2, 4), (2, 4, 1)])
    committed = [5, 9, 2, 140]
    _, logits = reference.verify(model, committed, tree)
    for path, row in zip([(), (1,), (2,), (1, 3), (2, 3), (2, 4), (2, 4, 1)], logits):
        tokens = torch.tensor([[*committed, 7, *path]], device=model.device)
        with torch.no_grad():
            alone = model(tokens).logits[0, -1]  # transformers' own mask and positions
        assert worst(mx.array(to_numpy(row)), alone) < 1e-4


def test_acceptance():
    """If this fails, tokens that the target did not choose get through, or chosen ones are thrown away."""
    random = np.random.default_rng(5)
    trees = [random_tree(random, rows=12, vocab=3) for _ in range(200)]
    choices = random.integers(3, size=(len(trees), 15))
    tree_batch = to_candidate_tree(trees, fillers=(0, 1, 2))  # one of them agrees with the root's choice
    accepted = accept(tree_batch, mx.array(choices, mx.int32))
    counts = []
    for b, (tree, row_choices) in enumerate(zip(trees, choices.tolist())):
        path = reference.accept(tree, row_choices)
        counts.append(len(path) - 1)
        assert accepted.count[b].item() == counts[-1]
        assert accepted.path[b].tolist() == path + path[-1:] * (tree_batch.max_depth - counts[-1])
        assert accepted.tokens[b].tolist()[: len(path)] == [row_choices[row] for row in path]
        assert accepted.last[b].item() == path[-1]
        assert accepted.root[b].item() == row_choices[path[-1]]
    assert {0, 1, 2, 3} <= set(counts)


def test_target_at_every_node(targets):
    """If this fails, verification gives nodes a wrong position or a wrong view, or commits wrong rows of the cache."""
    model, verifier = targets
    random = np.random.default_rng(6)
    committed = random.integers(VOCAB, size=(2, 9)).tolist()
    cache, _, _ = read_prompts(verifier, committed)
    for _ in range(3):  # from the second tree on, the cache holds what the commit before left there
        trees = [random_tree(random, rows=9, vocab=VOCAB) for _ in committed]
        hidden, logits = verifier(to_candidate_tree(trees), cache)
        paths = []
        for b, tree in enumerate(trees):
            their_hidden, their_logits = reference.verify(model, committed[b], tree)
            assert worst(hidden[b], their_hidden) < 1e-3
            assert worst(logits[b], their_logits) < 1e-3
            deepest = int(np.argmax(tree.depths))
            paths.append([row for row in range(9) if tree.ancestors[deepest][row]])
            committed[b] += [tree.tokens[row] for row in paths[-1]]
        counts = [len(path) - 1 for path in paths]
        padded = [(path + path[-1:] * 9)[1 : 1 + max(counts)] for path in paths]
        cache.commit(mx.array(padded, mx.int32), mx.array(counts, mx.int32), max(counts))
