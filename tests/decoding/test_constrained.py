"""The tree and the logits of a step under a constraint."""

from unittest.mock import create_autospec

import mlx.core as mx
import numpy as np
import pytest

from mlx_redrafter.constraints.constraint import regex
from mlx_redrafter.constraints.matcher import Matcher
from mlx_redrafter.decoding.batch_text import BatchText
from mlx_redrafter.decoding.constrained import jump, mask, masked, prune
from mlx_redrafter.decoding.loop import speculative
from mlx_redrafter.decoding.planner import Odds, Planner, StepRead
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.proposers import RecurrentProposer
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, Forced
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.tuning.acceptance_model import AcceptanceModel


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


def test_masks_are_made_while_the_device_verifies(monkeypatch):
    """If this fails, the device waits for the host in every step."""
    logits, events = mx.zeros((1, 2, 70)), []
    matcher = create_autospec(Matcher, instance=True)
    matcher.allowed.side_effect = lambda *_: events.append("masks") or np.full((2, 3), 1, np.uint32)
    submit = mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: events.append(arrays[0] is logits) or submit(*arrays))
    found = mask(matcher, logits, [1, 2], [0, 0])
    assert events == [True, "masks"]
    assert np.isfinite(np.array(found)).sum() == 2 * 3


def test_rows_that_fill_the_shape_go(pair, letters):
    """If this fails, a row that is no candidate is verified as one."""
    a, b, c = (letters[name] for name in "abc")
    matcher = Matcher(regex("a(b|c)[a-z]*"), pair[2], 4096)
    matcher.take([a])
    tree = CandidateTree.from_parents(
        mx.array([[a, b, c]]), mx.array([[0, 0, 0]]), 1, valid=mx.array([[True, False, True]])
    )
    grown = prune(matcher, tree, Drafted(DraftShape(2, 2, 2)), False, Odds(), mx.array([a]))
    assert (grown.tokens, grown.parents) == ([a, c], [0, 0])


def test_far_jumps_need_no_drafter(pair, letters):
    """If this fails, the drafter drafts what is known, or a plain step leaves out what is forced."""
    drafted = Drafted(DraftShape())
    poor = Odds(right=(0.2,))

    def jumps(matcher):
        """Of a plain step, one of a drafter that knows one root alone, one that drafts behind, and one that is poor."""
        ways = ((PLAIN, False, Odds()), (drafted, False, Odds()), (drafted, True, Odds()), (drafted, True, poor))
        return [jump(matcher, plan, behind, odds) for plan, behind, odds in ways]

    matcher = Matcher(regex("a(b|c)xyxyxyxyxy"), pair[2], 4096)
    matcher.take([letters["a"]])
    assert jumps(matcher) == [PLAIN, drafted, drafted, drafted]
    matcher.take([letters["b"]])
    far = Forced(len(matcher.forced(99)))
    assert far.num_draft_tokens >= 4 and jumps(matcher) == [far, far, drafted, far]
    matcher = Matcher(regex("a#(c|d)"), pair[2], 4096)
    matcher.take([letters["a"]])
    assert jumps(matcher) == [Forced(1), drafted, drafted, Forced(1)]


def test_drafts_stand_behind_what_is_forced(pair, letters):
    """If this fails, a step ends with what is forced, or what was drafted behind it is lost."""
    a, b, c = (letters[name] for name in "abc")
    matcher = Matcher(regex("a##(b|c)##[a-d]*"), pair[2], 4096)
    matcher.take([a])
    certain = matcher.forced(99)
    assert pair[2].decode(certain) == "##"
    tree = CandidateTree.static(mx.array([[certain[-1], b, a, c]], mx.int32), (0, 0, 0, 0))
    plan, known = Drafted(DraftShape(2, 3, 3)), len(certain)

    def rows(**odds):
        grown = prune(matcher, tree, plan, False, Odds(**odds), mx.array([a]), certain)
        return grown.tokens, grown.parents

    chain = [0, *range(known)]
    tokens, parents = rows(least=())  # the row of the wrong draft goes to what is forced behind the first
    assert tokens == [a, *certain, b, c, certain[0]] and parents == [*chain, known, known, known + 1]
    tokens, _ = rows(right=(0.5,), least=(0.3,) * 99)
    assert tokens == [a, *certain, b, c, *certain]  # behind the second one it is not probable enough
    tokens, _ = rows(right=(0.5,), least=(0.2,) * 99)
    assert tokens == [a, *certain, b, c, *certain, *certain]


SPARSE = regex(
    "(class [A-Z][A-Za-z]+:\n    def [a-z_]{3,12}[(]self(, [a-z]+){0,2}[)] -> None:\n        return None\n\n){1,9}"
)


class Heard(RecurrentProposer):
    """Keeps what it proposes."""

    def __init__(self, *args):
        super().__init__(*args)
        self.said: list[CandidateTree] = []

    def propose(self, *args, **options):
        self.said.append(super().propose(*args, **options))
        return self.said[-1]


def judged(said, places, text, constraint, tokenizer):
    """Whether the best of the drafts behind each place of a text was right: (depth, right), token by token.

    It counts where the grammar, which a matcher of its own follows, leaves a choice, and allows one of the drafts.
    """
    matcher, forced, allowed, found = Matcher(constraint, tokenizer, 4096), [], [], []
    for token in text:
        forced.append(bool(matcher.forced(1)))
        allowed.append(np.unpackbits(matcher.allowed([0], [0]).view(np.uint8), bitorder="little"))
        matcher.take([token])
    for tree, place in zip(said, places, strict=True):
        tokens, parents, row = tree.tokens[0].tolist(), tree.parents[0].tolist(), 0
        for depth, token in enumerate(text[place:]):
            drafts = [child for child in range(1, tree.rows) if parents[child] == row]
            drafts = [child for child in drafts if allowed[place + depth][tokens[child]]]
            if drafts and not forced[place + depth]:
                found.append((depth, tokens[drafts[0]] == token))
            row = next((child for child in drafts if tokens[child] == token), None)
            if row is None:
                break
    return found


@pytest.mark.parametrize("shape", [DraftShape(1, 5, 4), DraftShape(4, 5, 12)], ids=str)
def test_what_is_forced_tells_nothing_of_the_drafter(pair, shape):
    """If this fails, a drafter seems better than it is, or worse, and is used where it does not pay, or is not."""
    model, drafter, tokenizer = pair
    verifier, planner, learnt = verifier_of(model), create_autospec(Planner, instance=True), AcceptanceModel()
    planner.plan.return_value, planner.odds.return_value = Drafted(shape), Odds()
    reads: list[StepRead] = []
    planner.learn.side_effect = lambda read: (reads.append(read), learnt.learn(read))
    options = DecodingOptions(max_tokens=120, matcher=Matcher(SPARSE, tokenizer, 4096))
    proposer, prompt = Heard(drafter, verifier.target.embed), mx.array([tokenizer.encode("import os\n")])
    first, *steps = speculative(verifier, proposer, prompt, verifier.make_cache(), options, planner)
    text, places = list(first.tokens), []
    for read in reads:
        places.append(len(text) + read.certain)
        text += read.tokens
    expected = AcceptanceModel()
    for depth, right in judged(proposer.said, places, text, SPARSE, tokenizer):
        expected.first[depth].learn(right)
    assert learnt.to_dict()["first"] == expected.to_dict()["first"]
    assert len(steps) > sum(right for right, _ in expected.to_dict()["first"]) > 3
    assert sum(len(step.forced) for step in steps) > 30 and all(isinstance(step.plan, Drafted) for step in steps)


def test_no_batches(pair):
    """If this fails, a batch prunes all its texts by the grammar of the first."""
    options = DecodingOptions(matcher=Matcher(regex("a"), pair[2], 4096))
    with pytest.raises(UserError, match="one text at a time"):
        BatchText([1], options)
