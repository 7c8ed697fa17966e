"""Beam search against a search written with lists, and the trees chosen from it."""

import mlx.core as mx
import numpy as np
import pytest
from support import final_beams, make_drafter

from mlx_redrafter import DraftShape
from mlx_redrafter.drafting.beam_search import beam_search, candidate_tree, ranks, top
from mlx_redrafter.embedded.corpus import held_out_prefixes
from mlx_redrafter.target.model import Target
from mlx_redrafter.training.acceptance_length import acceptance_length


@pytest.fixture(scope="module")
def setting():
    drafter = make_drafter()
    table = mx.random.normal((97, 32))
    return drafter, (lambda tokens: table[tokens]), mx.random.normal((2, 32)), mx.array([5, 11], mx.int32)


def search_with_lists(drafter, embed, context, root, width, length, temperature=1.0):
    """All hypotheses of every step as (log-prob, tokens), best first."""
    projected = drafter.project_context(context)
    beams, steps = [(0.0, (), drafter.advance(embed(root), None))], []
    for _ in range(length - 1):
        grown = []
        for log_prob, tokens, state in beams:
            logits = drafter.logits(projected, state) / temperature
            scores = np.array(logits - mx.logsumexp(logits))
            for token in np.argsort(-scores)[:width]:
                grown.append((log_prob + float(scores[token]), (*tokens, int(token)), state))
        grown.sort(key=lambda g: -g[0])
        beams = [
            (lp, tokens, drafter.advance(embed(mx.array(tokens[-1])), state)) for lp, tokens, state in grown[:width]
        ]
        steps.append([(lp, tokens) for lp, tokens, _ in beams])
    return steps


@pytest.mark.parametrize(
    "width, length, temperature", [(1, 2, 1), (1, 5, 1), (3, 2, 1), (4, 5, 1), (8, 3, 1), (4, 5, 0.4)]
)
def test_same_hypotheses(setting, width, length, temperature):
    """If this fails, the drafter proposes other continuations than beam search would."""
    drafter, embed, context, root = setting
    beam = beam_search(drafter, embed, drafter.project_context(context), root, width, length, temperature)
    assert beam.tokens.shape == (2, length - 1, width)
    for b in range(2):
        expected = search_with_lists(drafter, embed, context[b], root[b], width, length, temperature)
        for step, hypotheses in enumerate(expected):
            np.testing.assert_allclose(beam.log_probs[b, step].tolist(), [lp for lp, _ in hypotheses], atol=1e-4)
        assert [tuple(s) for s in final_beams(beam)[b].tolist()] == [tokens for _, tokens in expected[-1]]


@pytest.mark.parametrize("n, count", [(5, 5), (97, 4), (388, 4), (4096, 16), (4097, 3), (64, 8), (64, 1)])
def test_top(n, count):
    """If this fails, a likely token is passed over."""
    rng = np.random.default_rng(n)
    scores = np.stack([rng.permutation(n), rng.permutation(n), np.arange(n)]).astype(np.float32)
    indices, values = top(mx.array(scores), count)
    expected = np.argsort(-scores, axis=-1)[:, :count]
    assert (np.array(indices) == expected).all()
    assert (np.array(values) == np.take_along_axis(scores, expected, -1)).all()


def test_top_gives_ties_to_the_lower_index():
    indices, _ = top(mx.zeros((1, 100)), 3)
    assert indices[0].tolist() == [0, 1, 2]


def paths_of(tree, b):
    """Token path of every valid row, by walking parents."""
    tokens, parents, valid = (x[b].tolist() for x in (tree.tokens, tree.parents, tree.valid))
    paths = []
    for i in range(1, len(tokens)):
        if valid[i]:
            assert parents[i] < i
            path, node = [], i
            while node:
                path.insert(0, tokens[node])
                node = parents[node]
            paths.append(tuple(path))
    return paths


@pytest.mark.parametrize("width, length, budget", [(4, 5, 16), (4, 5, 12), (4, 5, 5), (3, 4, 1), (1, 5, 4), (1, 5, 2)])
def test_best_first_keeps_the_most_probable_nodes(setting, width, length, budget):
    """If this fails, rows of the verification are spent on worse guesses than there are."""
    drafter, embed, context, root = setting
    beam = beam_search(drafter, embed, drafter.project_context(context), root, width, length)
    tree = candidate_tree(beam, root, budget, "best-first")
    assert tree.rows == 1 + budget and tree.tokens[:, 0].tolist() == root.tolist()
    for b in range(2):
        steps = search_with_lists(drafter, embed, context[b], root[b], width, length)
        visited = sorted((h for step in steps for h in step), key=lambda h: -h[0])
        assert sorted(paths_of(tree, b)) == sorted(tokens for _, tokens in visited[:budget])


@pytest.mark.parametrize("width, length, budget", [(4, 5, 16), (4, 5, 6), (3, 4, 1), (1, 5, 4)])
def test_beams_keeps_the_final_beams(setting, width, length, budget):
    """If this fails, the policy `beams` is not the paper's tree."""
    drafter, embed, context, root = setting
    beam = beam_search(drafter, embed, drafter.project_context(context), root, width, length)
    tree = candidate_tree(beam, root, budget, "beams")
    assert tree.rows == 1 + budget
    for b in range(2):
        wanted = []  # prefixes of better beams first, short ones before long ones
        for sequence in final_beams(beam)[b].tolist():
            for depth in range(1, length):
                if tuple(sequence[:depth]) not in wanted:
                    wanted.append(tuple(sequence[:depth]))
        assert sorted(paths_of(tree, b)) == sorted(wanted[:budget])


def mean_lengths(pair, prompts, nodes, max_tokens):
    """Mean acceptance lengths of a chain and of both trees (W = 4, L = 5) at equal rows, greedily."""
    model, drafter, _ = pair
    shapes = {
        "chain": DraftShape(1, nodes + 1, nodes),
        "beams": DraftShape(4, 5, nodes, "beams"),
        "best-first": DraftShape(4, 5, nodes),
    }
    return {n: acceptance_length(Target(model), drafter, prompts, s, max_tokens) for n, s in shapes.items()}


def test_best_first_gets_most_accepted(pair, prefixes):
    """If this fails, rows are spent on nodes that a greedy target does not choose."""
    found = mean_lengths(pair, prefixes[:6], 8, 48)
    assert found["best-first"] > max(found["chain"], found["beams"])


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [4, 8, 12, 16])
def test_best_first_gets_most_accepted_everywhere(pair, nodes):
    """The full claim: the 20 prefixes of the benchmarks, 128 tokens, every number of rows."""
    prompts = [pair[2].encode(text) for text in held_out_prefixes(20)]
    found = mean_lengths(pair, prompts, nodes, 128)
    assert found["best-first"] >= max(found["chain"], found["beams"])
    # All nodes of a search are one tree, whoever chooses them; fewer are not.
    assert nodes == 16 or found["best-first"] > max(found["chain"], found["beams"])


def test_a_drafter_gone_wrong_still_gives_a_tree(setting):
    """If this fails, a drafter whose training diverged can make the text wrong instead of slow."""
    drafter, embed, context, root = setting
    beam = beam_search(drafter, embed, drafter.project_context(context), root, 4, 5)
    beam.log_probs = mx.full(beam.log_probs.shape, mx.nan)
    for policy in ("best-first", "beams"):
        tree = candidate_tree(beam, root, 6, policy)
        for b in range(2):
            paths_of(tree, b)


def test_ranks_are_stable():
    """If this fails, a child of probability 1 can be kept without its parent."""
    keys = mx.array([[1.0, 3.0, 3.0, -1e30, 3.0, 2.0]])
    assert ranks(keys)[0].tolist() == [4, 0, 1, 5, 2, 3]
