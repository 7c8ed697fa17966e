"""Sampling with drafts is sampling without: the same text for a seed, the same distribution over seeds."""

import math

import mlx.core as mx
import numpy as np
import pytest
from support import make_drafter

from mlx_redrafter import DraftShape, stream_generate
from mlx_redrafter.decoding import step
from mlx_redrafter.decoding.sampling import position_keyed
from mlx_redrafter.decoding.step import DecodingOptions, SpeculativeStep, prefill
from mlx_redrafter.drafting.proposers import RecurrentProposer
from mlx_redrafter.drafting.shape import Drafted
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import accept

TEMPS = (0.3, 0.7, 1.0, 1.5)
FILTERS = ({}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 20}, {"xtc_probability": 0.5, "xtc_threshold": 0.1})
SHAPES = [DraftShape(w, 5, min(7, 4 * w), policy) for w in (1, 4) for policy in ("best-first", "beams")]
PROMPTS = [
    f"{start} {name}" for start in ("Once upon a time", "There was", "One day,", "The little") for name in
    ("a girl", "a boy named Tim", "a big dog", "a small bird", "the old man")
]  # fmt: skip


def texts_of(pair, prompt, drafters, shapes, chooser, count):
    model, _, tokenizer = pair
    plain = [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=count, chooser=chooser)]
    for drafter in drafters:
        for shape in shapes:
            stream = stream_generate(model, tokenizer, prompt, drafter, max_tokens=count, chooser=chooser, shape=shape)
            yield plain, [r.token for r in stream]


@pytest.mark.parametrize("temp", TEMPS)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_seed_gives_one_text(stories_pair, temp, filters):
    """If this fails, drafts change sampled text. (All prompts, shapes and drafters: the slow test below.)"""
    at = TEMPS.index(temp) * len(FILTERS) + FILTERS.index(filters)
    drafters = [stories_pair[1], make_drafter(vocab=512, hidden=64)][at % 2 : at % 2 + 1]
    chooser = position_keyed(temp, at, **filters)
    for plain, found in texts_of(stories_pair, PROMPTS[at], drafters, [SHAPES[at % 4]], chooser, 128):
        assert found == plain


@pytest.mark.slow
@pytest.mark.parametrize("temp", TEMPS)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_seed_gives_one_text_everywhere(stories_pair, temp, filters):
    """The full claim: 20 prompts x 128 tokens, W in {1, 4}, both policies, good and random drafter."""
    drafters = [stories_pair[1], make_drafter(vocab=512, hidden=64)]
    different = total = 0
    for seed, prompt in enumerate(PROMPTS):
        chooser = position_keyed(temp, seed, **filters)
        for plain, found in texts_of(stories_pair, prompt, drafters, SHAPES, chooser, 128):
            different, total = different + (plain != found), total + 1
    assert (different, total) == (0, 160)


def first_three(pair, ids, seeds, temp, batch=200):
    """(seeds, 3) the first three tokens by speculative decoding, many seeds side by side."""
    model, drafter, _ = pair
    verifier = verifier_of(model)
    rows = []
    for first in range(0, len(seeds), batch):
        choosers = [position_keyed(temp, seed) for seed in seeds[first : first + batch]]
        n = len(choosers)

        def choose(logits, positions, choosers=choosers):
            parts = [c(logits[b : b + 1], positions[b : b + 1]) for b, c in enumerate(choosers)]
            return mx.concatenate(parts)

        options = DecodingOptions(choose)
        cache = verifier.make_cache()
        hidden, logits = prefill(verifier.target, mx.array([ids] * n, mx.int32), cache.layers, options)
        cache.begin_trees(n)
        root = choose(logits[:, None], cache.length[:, None])[:, 0]
        proposer = RecurrentProposer(drafter, verifier.target.embed)
        step = SpeculativeStep(verifier, proposer, options, cache, hidden, root)
        texts = [[t] for t in root.tolist()]
        while min(map(len, texts)) < 3:
            submitted = step(Drafted(DraftShape(4, 3, 6)))
            counts, tokens = submitted.count.tolist(), submitted.tokens.tolist()
            for b in range(n):
                texts[b] += tokens[b][: counts[b] + 1]
        rows += [text[:3] for text in texts]
    return np.array(rows)


def exact_marginals(pair, ids, temp):
    """(3, vocab) exact probabilities of the first, second and third token, by summing over all texts."""
    target = Target(pair[0])
    vocab = target.vocab_size

    def following(tokens):
        logits = []
        for first in range(0, len(tokens), 512):
            _, out = target.forward(mx.array(tokens[first : first + 512], mx.int32), [None] * len(pair[0].layers))
            logits.append(np.array(mx.softmax(out[:, -1] / temp, axis=-1), np.float64))
        return np.concatenate(logits)

    one = following([ids])[0]
    two_given_one = following([[*ids, a] for a in range(vocab)])
    two = one @ two_given_one
    three = np.zeros(vocab)
    for a in np.argsort(-one)[:60]:  # the others have no weight to speak of
        three += one[a] * (two_given_one[a] @ following([[*ids, int(a), b] for b in range(vocab)]))
    return np.stack([one, two, three / three.sum()]), 1 - np.sort(one)[::-1][:60].sum()


def p_values(found, exact):
    """Of a chi-square test per position; rare tokens are counted together."""
    values = []
    for position in range(3):
        counts = np.bincount(found[:, position], minlength=exact.shape[1])
        expected = exact[position] * len(found)
        often = expected >= 8
        observed = np.append(counts[often], counts[~often].sum())
        wanted = np.append(expected[often], expected[~often].sum())
        statistic = ((observed - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum()
        # Wilson and Hilferty's normal approximation of the chi-square distribution.
        k = len(wanted) - 1
        z = ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / np.sqrt(2 / (9 * k))
        values.append(0.5 * (math.erfc(z / math.sqrt(2))))
    return values


def typical(tree, choices):
    """A wrong rule, like the ones that accept what is merely likely: the first node always counts as chosen."""
    wrong = mx.concatenate([tree.tokens[:, 1:2], choices[:, 1:]], axis=1)
    return accept(tree, wrong)


@pytest.mark.parametrize("seeds", [600, pytest.param(20_000, marks=pytest.mark.slow)])
def test_distribution_of_the_first_three_tokens(stories_pair, monkeypatch, seeds):
    """If this fails, sampled text is biased towards what the drafter likes; a wrong rule has to fail it."""
    ids = stories_pair[2].encode("Once upon a time there was")
    exact, left_out = exact_marginals(stories_pair, ids, 1.0)
    assert left_out < 0.01
    found = first_three(stories_pair, ids, list(range(seeds)), 1.0)
    assert min(p_values(found, exact)) > 0.001
    monkeypatch.setattr(step, "accept", typical)
    biased = first_three(stories_pair, ids, list(range(min(seeds, 1500))), 1.0)
    assert min(p_values(biased, exact)) < 1e-6
