"""Lookup changes no text, and pays in those that repeat themselves."""

import mlx.core as mx
import pytest
from support import RANDOM, REPEATING, Script, make_drafter, make_model, plainly

from mlx_redrafter import stream_generate
from mlx_redrafter.decoding.loop import speculative
from mlx_redrafter.decoding.planner import Planner
from mlx_redrafter.decoding.sampling import greedy, position_keyed
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.lookup import LookupProposer, TextIndex
from mlx_redrafter.drafting.proposers import Proposer, RecurrentProposer
from mlx_redrafter.drafting.shape import Drafted, DraftShape, LookedUp
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import CHAIN


def decoded(model, drafter, prompt, planner, choose=greedy, count=24, verifier=None):
    """The text with lookup, and its mean acceptance length."""
    verifier = verifier or verifier_of(model)
    inner = Proposer() if drafter is None else RecurrentProposer(drafter, verifier.target.embed)
    proposer, options = LookupProposer(inner, TextIndex(prompt)), DecodingOptions(choose, count)
    cache = verifier.make_cache()
    steps = [p.tokens for p in speculative(verifier, proposer, mx.array([prompt]), cache, options, planner)]
    tokens = [token for step in steps for token in step]
    return tokens[:count], (len(tokens) - 1) / (len(steps) - 1)


@pytest.mark.parametrize("temp", [0.0, 0.8])
@pytest.mark.parametrize("drafting", [True, False])
def test_lookup_changes_nothing(temp, drafting):
    """If this fails, lookup changes the text."""
    model, drafter = make_model(), make_drafter() if drafting else None
    choose = position_keyed(temp, seed=7)
    shapes = [DraftShape(), DraftShape(4, 5, 7), DraftShape(4, 5, 1), DraftShape(2, 3, 4, "beams")]
    plans = [Drafted(shape, True) for shape in shapes] if drafting else [LookedUp(3), LookedUp(15)]
    for prompt in (REPEATING, RANDOM, [5]):
        plain = plainly(model, prompt, 24, choose)
        for plan in plans:
            assert decoded(model, drafter, prompt, Planner(plan), choose)[0] == plain


@pytest.mark.parametrize("shape", [DraftShape(), pytest.param(DraftShape(4, 5, 7), marks=pytest.mark.slow)], ids=str)
def test_lookup_pays_in_texts_that_repeat_themselves(pair, prefixes, shape):
    """If this fails, lookup finds nothing, or what it finds is not checked."""
    model, drafter, tokenizer = pair
    function = "def total(items):\n    result = 0\n    for item in items:\n        result += item.price * item.count\n"
    lengths = {"off": 0.0, "on": 0.0}
    for prompt in (tokenizer.encode((function + "    return result\n\n\n") * 2 + function[:30]), prefixes[1] * 2):
        plain = plainly(model, prompt, 64)
        found, length = decoded(model, drafter, prompt, Planner(Drafted(shape, True)), count=64)
        assert found == plain
        lengths["on"] += length
        *_, last = stream_generate(model, tokenizer, prompt, drafter, max_tokens=64, shape=shape)
        lengths["off"] += last.mean_acceptance_length
        if shape.beam_width == 1:
            found, alone = decoded(model, None, prompt, Planner(LookedUp(3)), count=64)
            assert found == plain and alone > 1.5
    assert lengths["on"] > lengths["off"] + 0.2


def test_on_a_target_that_takes_chains_only(small_model, chains_only):
    """If this fails, lookup puts branches where the target cannot verify them."""
    verifier = verifier_of(small_model)
    assert verifier.capability == CHAIN
    plain, tree = plainly(small_model, REPEATING, 24), Drafted(DraftShape(4, 5, 7), with_lookup=True)
    for planner in (Planner(tree), Script([tree, LookedUp(7), Drafted(DraftShape(4, 5, 7))])):
        assert decoded(small_model, make_drafter(), REPEATING, planner, verifier=verifier)[0] == plain
