"""The tree and the logits of a step under a constraint."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_redrafter.constraints.constraint import regex
from mlx_redrafter.constraints.matcher import Matcher
from mlx_redrafter.decoding.batch_text import BatchText
from mlx_redrafter.decoding.constrained import jump, masked, prune
from mlx_redrafter.decoding.options import DecodingOptions
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, Forced
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.tree import CandidateTree


@pytest.fixture
def letters(pair):
    return {letter: pair[2].encode(letter)[0] for letter in "abcdxy"}


def test_masks_are_bits():
    """If this fails, a grammar's bits allow other tokens than it means."""
    allowed = np.random.default_rng(0).random((3, 70)) < 0.5
    words = np.packbits(np.pad(allowed, ((0, 0), (0, 26))), axis=1, bitorder="little").view(np.uint32)
    logits = mx.random.normal((1, 3, 70))
    found = masked(logits, words)
    assert np.array_equal(np.isfinite(np.array(found[0])), allowed)
    assert np.array_equal(np.array(found[0])[allowed], np.array(logits[0])[allowed])


def test_rows_that_fill_the_shape_go(pair, letters):
    """If this fails, a row that is no candidate is verified as one."""
    a, b, c = (letters[name] for name in "abc")
    matcher = Matcher(regex("a(b|c)[a-z]*"), pair[2], 4096)
    matcher.take([a])
    tree = CandidateTree.from_parents(
        mx.array([[a, b, c]]), mx.array([[0, 0, 0]]), 1, valid=mx.array([[True, False, True]])
    )
    pruned = prune(matcher, tree, Drafted(DraftShape(2, 2, 2)), chain=False)
    assert pruned.tokens.tolist() == [[a, c]] and pruned.in_order


def test_far_jumps_need_no_drafter(pair, letters):
    """If this fails, the drafter drafts what is known, or a plain step leaves out what is forced."""
    drafted = Drafted(DraftShape())
    matcher = Matcher(regex("a(b|c)xyxyxyxyxy"), pair[2], 4096)
    matcher.take([letters["a"]])
    assert (jump(matcher, drafted), jump(matcher, PLAIN)) == (drafted, PLAIN)
    matcher.take([letters["b"]])
    far = jump(matcher, drafted)
    assert isinstance(far, Forced) and far.num_draft_tokens >= 4
    matcher = Matcher(regex("a#(c|d)"), pair[2], 4096)
    matcher.take([letters["a"]])
    assert (jump(matcher, drafted), jump(matcher, PLAIN)) == (drafted, Forced(1))


def test_no_batches(pair):
    """If this fails, a batch prunes all its texts by the grammar of the first."""
    options = DecodingOptions(matcher=Matcher(regex("a"), pair[2], 4096))
    with pytest.raises(UserError, match="one text at a time"):
        BatchText([1], options)
