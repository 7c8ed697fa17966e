"""The target's choice: noise by position, filters, and mlx-lm's samplers."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler
from support import make_drafter

from mlx_redrafter.decoding.sampling import draft_temperature, from_sampler, greedy, position_keyed
from mlx_redrafter.drafting.kinds import proposer_for
from mlx_redrafter.drafting.proposers import RecurrentProposer
from mlx_redrafter.errors import UserError


def test_noise_depends_on_seed_and_position_alone():
    """If this fails, a seed gives another text with a drafter than without."""
    logits = mx.broadcast_to(mx.random.normal((50,)), (1, 6, 50))
    positions = mx.array([[7, 8, 8, 9, 1000, 7]])
    choose = position_keyed(1.5, seed=3)
    together = choose(logits, positions)[0].tolist()
    alone = [choose(logits[:, :1], mx.array([[p]])).item() for p in (7, 8, 8, 9, 1000, 7)]
    assert together == alone
    many = mx.broadcast_to(logits[:, :1], (1, 64, 50))
    first, other = (position_keyed(1.5, seed=s)(many, mx.arange(64)[None])[0].tolist() for s in (3, 4))
    assert first != other and len(set(first)) > 5


@pytest.mark.parametrize(
    "temp, options", [(1.0, {}), (0.5, {}), (1.3, {"top_p": 0.8}), (1, {"min_p": 0.2}), (1, {"top_k": 3})]
)
def test_distribution(temp, options):
    """If this fails, sampled text is not distributed as the target says."""
    logits = mx.array([2.0, 1.5, 1.0, 0.0, -1.0, -3.0])
    probabilities = np.array(mx.softmax(logits))
    keep = np.ones(6, bool)
    if "top_p" in options:
        keep = np.cumsum(probabilities) - probabilities < options["top_p"]
    if "min_p" in options:
        keep = probabilities >= options["min_p"] * probabilities[0]
    if "top_k" in options:
        keep = np.arange(6) < options["top_k"]
    expected = np.where(keep, np.exp(np.array(logits) / temp), 0)
    expected /= expected.sum()
    draws = 20_000
    chosen = position_keyed(temp, 1, **options)(mx.broadcast_to(logits, (1, draws, 6)), mx.arange(draws)[None])
    counts = np.bincount(np.array(chosen[0]), minlength=6)
    assert counts[~keep].sum() == 0
    error = np.sqrt(expected * (1 - expected) * draws)
    assert (np.abs(counts - expected * draws) <= 4.5 * error + 1e-9).all()


def test_temperature_zero_is_greedy():
    assert position_keyed(0.0) is greedy


def test_mlx_lm_samplers():
    """If this fails, a program that brings its own sampler gets other tokens than with mlx-lm."""
    logits = mx.random.normal((1, 5, 40)) * 8
    assert mx.array_equal(from_sampler(make_sampler(0.0))(logits, None), greedy(logits, None))
    assert mx.array_equal(from_sampler(make_sampler(1.0, top_k=1))(logits, None), greedy(logits, None))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"temp": -1}, "--temp is -1"),
        ({"temp": float("nan")}, "--temp is nan"),
        ({"temp": 1, "top_p": 2}, "--top-p is 2"),
        ({"temp": 1, "top_p": -0.1}, "--top-p is -0.1"),
        ({"temp": 1, "min_p": 1.5}, "--min-p is 1.5"),
        ({"temp": 1, "top_k": -1}, "--top-k is -1"),
    ],
)
def test_out_of_range(arguments, message):
    with pytest.raises(UserError, match=message):
        position_keyed(**arguments)


def test_a_drafter_is_as_sure_as_the_target_is_cold():
    """If this fails, trees are chosen as though the target drew its tokens otherwise than it does."""
    assert draft_temperature(greedy) == pytest.approx(0.7)
    found = [draft_temperature(position_keyed(temp)) for temp in (0.0, 0.3, 0.7, 1.0, 2.0)]
    assert found == sorted(set(found)) and found[0] == draft_temperature(greedy)
    assert found[4] == pytest.approx(2.0, rel=0.1)  # what the drafter does not know is little beside that
    assert draft_temperature(from_sampler(make_sampler(0.9))) == 1


@pytest.mark.parametrize("choose", [greedy, position_keyed(1.0)])
def test_the_proposer_goes_by_it(choose):
    """If this fails, the temperature is known and not used."""
    drafter = make_drafter()
    table = mx.random.normal((97, 32), key=mx.random.key(1))
    proposer = proposer_for(drafter, lambda tokens: table[tokens], draft_temperature(choose))
    assert isinstance(proposer, RecurrentProposer)
    assert proposer.temperature == draft_temperature(choose)
