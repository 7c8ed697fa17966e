"""Medusa's candidates, text with them that is the target's own, word for word, and text without any."""

import mlx.core as mx
import numpy as np
import pytest
from support import make_model, plainly
from support.medusa import PROMPT, knowing, make_heads, steps_of

from mlx_redrafter import DraftShape
from mlx_redrafter.decoding.loop import speculative
from mlx_redrafter.decoding.planner import Planner
from mlx_redrafter.decoding.sampling import position_keyed
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.lookup import LookupProposer, TextIndex
from mlx_redrafter.drafting.medusa_tree import PUBLISHED
from mlx_redrafter.drafting.proposers import MedusaProposer, Proposer
from mlx_redrafter.drafting.shape import Drafted
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import CHAIN

ALL = DraftShape(16, 5, 63)


@pytest.mark.parametrize(
    "shape, expected",
    [
        (ALL, PUBLISHED),
        (DraftShape(), [(0,), (0, 0), (0, 0, 0)]),
        (DraftShape(1, 8, 7), [(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)]),
        (DraftShape(3, 3, 5), [(0,), (0, 0), (1,), (0, 1), (2,)]),
    ],
    ids=str,
)
def test_candidates_are_the_heads_best_tokens(shape, expected):
    """If this fails, a path is put together from the wrong heads or the wrong ranks."""
    heads = make_heads()
    context, root = mx.random.normal((2, 32)), mx.array([5, 6])
    tree = MedusaProposer(heads).propose(context, root, Drafted(shape))
    ranked = np.argsort(-np.array(heads(context)), axis=-1)
    assert tree.rows == 1 + len(expected) and tree.max_depth == max(map(len, expected))
    assert tree.in_order == (shape.beam_width == 1)
    for b in range(2):
        assert tree.tokens[b, 0].item() == [5, 6][b]
        for row, choice in enumerate(expected, 1):
            path, at = [], row
            while at:
                path.insert(0, tree.tokens[b, at].item())
                at = tree.parents[b, at].item()
            assert path == [ranked[b, k, rank] for k, rank in enumerate(choice)]


@pytest.mark.parametrize("temp", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("shape", [ALL, DraftShape(), DraftShape(4, 4, 9)], ids=str)
def test_equals_plain_decoding(shape, temp):
    """If this fails, Medusa changes the text, which only its own typical acceptance may."""
    model, choose = make_model(), position_keyed(temp, seed=3)
    text = plainly(model, PROMPT, 40, choose)
    heads = knowing(make_heads(), model, PROMPT + text)
    steps = steps_of(model, heads, shape, 40, choose)
    assert [token for step in steps for token in step][:40] == text
    assert max(map(len, steps)) > 2  # drafts were accepted, so accepting them was tested
    assert [t for s in steps_of(model, make_heads(seed=1), shape, 20, choose) for t in s][:20] == text[:20]


def test_on_a_target_that_takes_chains_only(small_model, chains_only):
    verifier = verifier_of(small_model)
    assert verifier.capability == CHAIN
    steps = steps_of(small_model, make_heads(), ALL, 30, verifier=verifier)
    assert [t for step in steps for t in step][:30] == plainly(small_model, PROMPT, 30)


def test_together_with_lookup(small_model):
    """If this fails, lookup and a static tree do not fit together."""
    text = plainly(small_model, PROMPT, 40)
    for shape in (DraftShape(4, 4, 9), DraftShape()):
        proposer = LookupProposer(MedusaProposer(make_heads()), TextIndex(PROMPT))
        steps = steps_of(small_model, None, shape, 40, proposer=proposer)
        assert [t for step in steps for t in step][:40] == text


def test_nobody_proposes_nothing(small_model):
    """If this fails, steps of texts that nobody drafts for check rows, or need somebody."""
    verifier, options = verifier_of(small_model), DecodingOptions(max_tokens=9)
    steps = speculative(verifier, Proposer(), mx.array([PROMPT]), verifier.make_cache(), options, Planner(Drafted(ALL)))
    found = [(produced.tokens, produced.drafts) for produced in steps]
    assert found == [([token], 0) for token in plainly(small_model, PROMPT, 9)]
