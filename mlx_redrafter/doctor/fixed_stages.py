"""Stages that need no model: what happens to tokens, from made-up beams and logits.

Knows nothing of models. The results are whole numbers, and have to be the same everywhere.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_redrafter.decoding.sampling import Chooser, greedy, position_keyed
from mlx_redrafter.doctor.comparison import Stage
from mlx_redrafter.drafting.beam_search import Beam, candidate_tree
from mlx_redrafter.drafting.shape import POLICIES
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import accept

WIDTH, LENGTH, VOCAB, ROWS = 4, 5, 4096, 12
NODES = (3, 8, WIDTH * (LENGTH - 1))
CASES = 3


def fixed_stages() -> list[Stage]:
    return [Stage("tree building", _trees), Stage("sampling", _samples), Stage("acceptance", _accepted)]


def made_up_beam(seed: int) -> Beam:
    """A beam as a search leaves it: entries in order of falling probability, no child likelier than its parent."""
    rng = np.random.default_rng(seed)
    above, tokens, origins, log_probs = np.zeros(1), [], [], []
    for _ in range(LENGTH - 1):
        grew_from = rng.integers(len(above), size=WIDTH)
        values = above[grew_from] - rng.exponential(1.0, WIDTH)
        order = np.argsort(-values)
        tokens.append(rng.permutation(VOCAB)[:WIDTH])
        origins.append(grew_from[order])
        above = values[order]
        log_probs.append(above)
    ids, places = (mx.array(np.stack(parts)[None].astype(np.int32)) for parts in (tokens, origins))
    return Beam(ids, places, mx.array(np.stack(log_probs)[None].astype(np.float32)))


def _trees() -> dict[str, mx.array]:
    return {
        f"{policy}, {nodes} nodes, beam {seed}: {part}": getattr(tree, part)
        for seed in range(CASES)
        for policy in POLICIES
        for nodes in NODES
        for tree in [candidate_tree(made_up_beam(seed), mx.array([7], mx.int32), nodes, policy)]
        for part in ("tokens", "parents", "depths", "ancestors", "valid")
    }


def _samples() -> dict[str, mx.array]:
    logits = mx.array(4 * np.random.default_rng(0).standard_normal((1, ROWS, VOCAB)), mx.float32)
    positions = mx.arange(100, 100 + ROWS, dtype=mx.int32)[None]
    choosers: dict[str, Chooser] = {
        "greedy": greedy,
        "temperature": position_keyed(0.7, seed=1),
        "top-p": position_keyed(1.0, seed=2, top_p=0.9),
        "min-p": position_keyed(1.0, seed=3, min_p=0.05),
        "top-k": position_keyed(1.2, seed=4, top_k=20),
        "XTC": position_keyed(1.0, seed=5, xtc_probability=0.5, xtc_threshold=0.05),
    }
    chosen = {name: choose(logits, positions) for name, choose in choosers.items()}
    return chosen | {"random numbers": mx.random.randint(0, 2**30, (256,), key=mx.random.key(6))}


def _accepted() -> dict[str, mx.array]:
    chain = np.maximum(np.arange(LENGTH) - 1, 0)
    found: dict[str, mx.array] = {}
    for seed, parents in enumerate([chain, np.array([0, 0, 0, 1, 1, 2, 3, 6, 7])] * CASES):
        rng = np.random.default_rng(seed)
        tokens, choices = (rng.permutation(VOCAB)[: len(parents)] for _ in range(2))
        # Most rows choose one of their children, so that paths of several lengths are accepted.
        for row in range(1, len(parents)):
            if rng.random() < 0.7:
                choices[parents[row]] = tokens[row]
        ids = mx.array(tokens[None], mx.int32)
        static = CandidateTree.static(ids, tuple(parents.tolist()))
        built = CandidateTree.from_parents(ids, mx.array(parents[None], mx.int32), static.max_depth)
        for how, tree in (("static", static), ("built", built)):
            accepted = accept(tree, mx.array(choices[None], mx.int32))
            counts = mx.arange(accepted.path.shape[1]) <= accepted.count[:, None]
            parts = {"count": accepted.count, "root": accepted.root, "last": accepted.last}
            parts |= {"path": mx.where(counts, accepted.path, 0), "tokens": mx.where(counts, accepted.tokens, 0)}
            found |= {f"case {seed}, {how}: {name}": array for name, array in parts.items()}
    return found
