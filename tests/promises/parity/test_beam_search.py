"""Beams and trees on MLX against the PyTorch reference: same candidates, same probabilities."""

from __future__ import annotations

import mlx_redrafter  # isort: skip # noqa: F401 (before torch and mlx: it puts OpenBLAS in front of MLX's own BLAS)

import mlx.core as mx
import numpy as np
import pytest
from support import final_beams

from mlx_redrafter.drafting.beam_search import Beam, beam_search, candidate_tree
from mlx_redrafter.target.tree import CandidateTree

torch = pytest.importorskip("torch", reason="the PyTorch reference needs torch")

import torch_reference as reference  # noqa: E402
from torch_reference.cases import SHAPES, random_contexts  # noqa: E402
from torch_reference.pairs import to_numpy  # noqa: E402

POLICIES = ("best-first", "beams")


def search_both(drafters, embedding, width: int, length: int, batch: int = 3):
    """The same beam search on both sides: MLX's over the whole batch, the reference's row by row."""
    theirs, ours = drafters
    table, rows = embedding
    contexts, roots = random_contexts(batch)
    beam = beam_search(
        ours, rows, ours.project_context(mx.array(to_numpy(contexts))), mx.array(roots, mx.int32), width, length
    )
    found = [
        reference.beam_search(theirs, table, context, root, width, length) for context, root in zip(contexts, roots)
    ]
    return beam, found, roots


def assert_same_beams(beam: Beam, found: list[list[list[reference.Hypothesis]]]) -> None:
    for b, steps in enumerate(found):
        assert beam.tokens[b].tolist() == [[h.tokens[-1] for h in step] for step in steps]
        log_probs = np.array([[h.log_prob for h in step] for step in steps])
        assert np.abs(np.array(beam.log_probs[b]) - log_probs).max() < 1e-4
        assert final_beams(beam)[b].tolist() == [list(h.tokens) for h in steps[-1]]


def path_to(row: int, parents: list[int], tokens: list[int]) -> tuple[int, ...]:
    return () if row == 0 else (*path_to(parents[row], parents, tokens), tokens[row])


def assert_same_tree(ours: CandidateTree, batch_row: int, theirs: reference.Tree) -> None:
    """Compares the rows that count, in the reference's order: ours only has parents before their children."""
    parents, tokens = ours.parents[batch_row].tolist(), ours.tokens[batch_row].tolist()
    assert all(parent < row for row, parent in enumerate(parents) if row)
    found = {path_to(r, parents, tokens): r for r, valid in enumerate(ours.valid[batch_row].tolist()) if valid}
    assert len(found) == sum(ours.valid[batch_row].tolist()) == len(theirs.tokens)  # none is there twice
    kept = [found[path_to(row, theirs.parents, theirs.tokens)] for row in range(len(theirs.tokens))]
    number = {row: index for index, row in enumerate(kept)}
    assert [ours.tokens[batch_row, row].item() for row in kept] == theirs.tokens
    assert [number[parents[row]] for row in kept] == theirs.parents
    assert [ours.depths[batch_row, row].item() for row in kept] == theirs.depths
    mask = np.array(ours.ancestors[batch_row])[kept]
    assert mask[:, kept].tolist() == theirs.ancestors
    assert mask.sum() == mask[:, kept].sum()  # nor does a row that counts look at one that does not
    assert max(theirs.depths) <= ours.max_depth


@pytest.mark.parametrize(("width", "length"), sorted({shape[:2] for shape in SHAPES} | {(20, 3)}))
def test_beams(drafters, embedding, width, length):
    """If this fails, drafts are not the drafter's most probable ones, or their probabilities are wrong."""
    beam, found, _ = search_both(drafters, embedding, width, length, batch=2)
    assert_same_beams(beam, found)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("width", "length", "nodes"), SHAPES)
def test_trees(drafters, embedding, width, length, nodes, policy):
    """If this fails, the target checks other nodes than the policy says, or connects them wrongly."""
    beam, found, roots = search_both(drafters, embedding, width, length)
    for count in sorted({1, nodes, width * (length - 1)}):
        tree = candidate_tree(beam, mx.array(roots, mx.int32), count, policy)
        assert tree.rows == 1 + count
        for b, (steps, root) in enumerate(zip(found, roots)):
            assert_same_tree(tree, b, reference.candidate_tree(steps, root, count, policy))
