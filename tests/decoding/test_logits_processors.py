"""Logits processors see exactly the tokens on the path to their row."""

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors
from support import make_drafter, make_model

from mlx_redrafter import DraftShape, stream_generate
from mlx_redrafter.decoding.logits_processors import process_tree
from mlx_redrafter.decoding.loop import speculative
from mlx_redrafter.decoding.planner import Planner
from mlx_redrafter.decoding.sampling import position_keyed
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.proposers import RecurrentProposer
from mlx_redrafter.drafting.shape import Drafted
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.tree import CandidateTree

PROMPT = "import os\n\n\ndef read_lines(path):\n"


def only_digits(tokenizer):
    allowed = [i for i in range(4096) if tokenizer.decode([i]).isdigit()]
    bias = np.full(4096, -np.inf, np.float32)
    bias[allowed] = 0
    return lambda tokens, logits: logits + mx.array(bias)


# Before 0.32 mlx-lm showed processors only the end of the prompt.
whole_prompt = pytest.mark.skipif(
    tuple(map(int, mlx_lm.__version__.split(".")[:2])) < (0, 32), reason="mlx-lm 0.32 or later to compare with"
)


@whole_prompt
@pytest.mark.parametrize("kind", ["repetition", "presence", "frequency", "bias", "digits"])
@pytest.mark.parametrize(
    "shape",
    [DraftShape(4, 5, 7), DraftShape(1, 4, 3), pytest.param(DraftShape(4, 5, 12, "beams"), marks=pytest.mark.slow)],
    ids=str,
)
def test_same_tokens_as_mlx_lm(pair, kind, shape):
    """If this fails, penalties or constraints act on tokens that were never written."""
    model, drafter, tokenizer = pair
    processors = {
        "repetition": make_logits_processors(repetition_penalty=1.3),
        "presence": make_logits_processors(presence_penalty=2.0),
        "frequency": make_logits_processors(frequency_penalty=1.0, repetition_penalty=1.1),
        "bias": make_logits_processors(logit_bias={199: -5.0, 14: 3.0}),
        "digits": [only_digits(tokenizer)],
    }[kind]
    options = {"max_tokens": 40, "logits_processors": processors}
    expected = list(mlx_lm.stream_generate(model, tokenizer, PROMPT, **options))
    assert [r.token for r in expected] != [
        r.token for r in mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=40)
    ]
    for used in (None, drafter):
        found = list(stream_generate(model, tokenizer, PROMPT, used, shape=shape, **options))
        assert [r.token for r in found] == [r.token for r in expected]
        assert mx.abs(found[-1].logprobs[:9] - expected[-1].logprobs[:9]).max().item() < 1e-3 or kind == "digits"
    assert kind == "digits" or found[-1].mean_acceptance_length > 1  # drafting goes on under processors


def test_rows_see_their_paths():
    """If this fails, a row's processors see a sibling's tokens."""
    parents = [0, 0, 0, 1, 3, 2]
    tokens = [50, 51, 52, 53, 54, 55]
    tree = CandidateTree.from_parents(mx.array([tokens], mx.int32), mx.array([parents]), 3)
    seen = []

    def spy(tokens, logits):
        seen.append(tokens.tolist())
        return logits + len(seen)

    out = process_tree([spy], mx.array([7, 8], mx.int32), tree, mx.zeros((1, 6, 3)))
    assert seen == [
        [7, 8, 50],
        [7, 8, 50, 51],
        [7, 8, 50, 52],
        [7, 8, 50, 51, 53],
        [7, 8, 50, 51, 53, 54],
        [7, 8, 50, 52, 55],
    ]
    assert out[0, :, 0].tolist() == [1, 2, 3, 4, 5, 6]


def test_the_whole_text_is_seen():
    """If this fails, a processor that counts or parses loses tokens between steps."""
    model, drafter = make_model(), make_drafter()
    verifier = verifier_of(model)
    seen = {}

    def spy(tokens, logits):
        seen[tuple(tokens.tolist())] = True
        return logits

    prompt = [3, 1, 4]
    options = DecodingOptions(position_keyed(1.0, 1), 25, [spy])
    text = []
    proposer = RecurrentProposer(drafter, verifier.target.embed)
    for produced in speculative(
        verifier, proposer, mx.array([prompt]), verifier.make_cache(), options, Planner(Drafted(DraftShape()))
    ):
        text += produced.tokens
    for n in range(25):
        assert (*prompt, *text[:n]) in seen


def test_together_with_a_sampler_and_a_seed(pair):
    """If this fails, the same seed gives other words under a penalty."""
    model, drafter, tokenizer = pair
    texts = [
        [
            r.token
            for r in stream_generate(
                model,
                tokenizer,
                PROMPT,
                used,
                max_tokens=40,
                chooser=position_keyed(0.8, 4),
                logits_processors=make_logits_processors(repetition_penalty=1.2),
            )
        ]
        for used in (None, drafter)
    ]
    assert texts[0] == texts[1]


@whole_prompt
def test_plain_loop_of_mlx_lm_sees_the_same(small_model):
    """If this fails, ours hands processors another history than mlx-lm does."""
    histories = []
    for loop in (
        lambda spy: list(generate_step(mx.array([3, 1, 4]), small_model, max_tokens=6, logits_processors=[spy])),
        lambda spy: list(
            speculative(
                verifier := verifier_of(small_model),
                RecurrentProposer(make_drafter(), verifier.target.embed),
                mx.array([[3, 1, 4]]),
                verifier.make_cache(),
                DecodingOptions(max_tokens=6, processors=[spy]),
                Planner(Drafted(DraftShape(1, 2, 1))),
            )
        ),
    ):
        seen = set()
        loop(lambda tokens, logits, seen=seen: seen.add(tuple(tokens.tolist())) or logits)
        histories.append(seen)
    assert {h for h in histories[0] if len(h) < 9} <= histories[1]
