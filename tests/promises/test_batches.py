"""Texts that are decoded together are those that are decoded alone and plainly, whoever joins and leaves, and when."""

import dataclasses
import functools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mlx_redrafter.benchmarks.architectures import small_models
from support import make_drafter, make_model, plainly

from mlx_redrafter.decoding.batch import Batch
from mlx_redrafter.decoding.batch_text import BatchText
from mlx_redrafter.decoding.loop import autoregressive
from mlx_redrafter.decoding.planner import BatchPlanner
from mlx_redrafter.decoding.sampling import greedy, position_keyed
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.kinds import proposer_for
from mlx_redrafter.drafting.lookup import LookupProposer
from mlx_redrafter.drafting.proposers import Proposer
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, LookedUp
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import CHAIN

MODULES = {
    "llama": "tree",
    "gemma3_text": "tree",  # windows beside whole caches
    "qwen3_moe": "tree",
    "deepseek_v3": "tree",  # latent attention
    "qwen3_next": "chain",  # recurrent states beside attention
}
LONGEST, AFTER = 24, 3  # tokens of a text at most, and of what goes on from its cache
PROMPTS = [np.random.default_rng(n).integers(0, 97, n).tolist() for n in (1, 2, 3, 5, 8, 17, 21, 40)]
CHOOSERS = [greedy, *(position_keyed(0.8, seed, top_p=0.9) for seed in (1, 2)), position_keyed(1.0, 3, top_k=20)]
SIZES = (1, 2, 3, 5, 8, 16)


class Turns(BatchPlanner):
    """Another plan in every step."""

    def __init__(self, plans):
        super().__init__(plans[0])
        self.plans, self.steps = plans, 0

    def plan(self, texts, length, follows=()):
        self.steps += 1
        return self.plans[self.steps % len(self.plans)]


@functools.cache
def pair(module):
    """Verifier, drafter, and plans that it allows."""
    model = make_model() if module == "llama" else small_models.build(module)
    verifier = verifier_of(model)
    assert verifier.capability == MODULES[module]
    drafter = make_drafter() if module == "llama" else small_models.random_drafter(verifier.target)
    plans = [PLAIN, Drafted(DraftShape(1, 4, 3)), Drafted(DraftShape(1, 3, 2))]
    plans += [LookedUp(3), Drafted(DraftShape(1, 4, 3), with_lookup=True)]
    if verifier.capability != CHAIN:
        plans += [Drafted(DraftShape(3, 4, 6)), Drafted(DraftShape(2, 3, 3, "beams"))]
        plans += [Drafted(DraftShape(3, 4, 6), with_lookup=True)]
    return model, verifier, drafter, plans


@functools.cache
def alone(module, prompt, chooser):
    """A text that is decoded alone, and plainly."""
    return plainly(pair(module)[0], PROMPTS[prompt], LONGEST + AFTER, CHOOSERS[chooser])


class Knows(Proposer):
    """Proposes what a text alone says, but for every fifth place: random heads are hardly ever right."""

    def __init__(self, module, prompt, chooser):
        said = alone(module, prompt, chooser) + [0] * 16
        self.said = mx.array([[(token + (n % 5 == 4)) % 97 for n, token in enumerate(said)]], mx.int32)
        self.prompt = PROMPTS[prompt]

    def begin(self, text, root, contexts):
        self.at = mx.array([0 if text.shape[1] == len(self.prompt) else -1])  # of the root, in what is said

    def propose(self, context, root, plan, chain_only=False):
        depth = plan.shape.as_chain().num_draft_tokens
        ahead = mx.take_along_axis(self.said, self.at[:, None] + 1 + mx.arange(depth), axis=1)
        if chain_only or plan.shape.beam_width == 1:
            return CandidateTree.chain(mx.concatenate([root[:, None], ahead], axis=1))
        # A wrong token beside each right one, in front of it, so that rows have to be moved.
        pairs = mx.stack([(ahead + 1) % 97, ahead], axis=2).reshape(ahead.shape[0], -1)
        parents = [0, 0, 0, *(row for right in range(2, 2 * depth, 2) for row in (right, right))]
        parents = mx.array([parents[: 1 + 2 * depth]] * root.shape[0], mx.int32)
        return CandidateTree.from_parents(mx.concatenate([root[:, None], pairs], axis=1), parents, depth)

    def advance(self, accepted, contexts):
        self.at = self.at + accepted.count + 1

    def join(self, other):
        self.said, self.at = mx.concatenate([self.said, other.said]), mx.concatenate([self.at, other.at])

    def keep(self, texts):
        self.said, self.at = self.said[mx.array(texts)], self.at[mx.array(texts)]

    def arrays(self):
        return [self.said, self.at]


@st.composite
def schedules(draw, plans):
    """How many run at once, in which chunks prompts are read, what is drafted, and who joins and leaves when."""
    size = draw(st.sampled_from(SIZES))
    texts = st.tuples(
        st.integers(0, len(PROMPTS) - 1),
        st.integers(0, len(CHOOSERS) - 1),
        st.integers(1, LONGEST),  # its limit
        st.sampled_from((0, 0, 0, 1, 4)),  # steps between the one before and it
        st.none() | st.integers(1, LONGEST),  # tokens after which it is removed
    )
    count = draw(st.integers(size, size + 4))
    return (
        size,
        draw(st.sampled_from((1, 7, 64))),
        draw(st.booleans()),  # whether drafts are right
        draw(st.lists(st.integers(0, plans - 1), min_size=1, max_size=4)),
        draw(st.lists(texts, min_size=count, max_size=count)),
    )


def run(module, schedule):
    size, chunk, right, turns, wanted = schedule
    model, verifier, drafter, plans = pair(module)
    own = [
        functools.partial(greedy) if chooser == 0 else dataclasses.replace(CHOOSERS[chooser])
        for _, chooser, *_ in wanted
    ]
    whose = {id(choose): text for choose, text in zip(own, wanted, strict=True)}  # prompts are read in any order

    def proposer(text):
        prompt, chooser, *_ = whose[id(text.options.choose)]
        inner = Knows(module, prompt, chooser) if right else proposer_for(drafter, verifier.target.embed)
        return LookupProposer(inner, None, text.before)

    batch = Batch(
        verifier,
        proposer,
        Turns([plans[turn] for turn in turns]),
        most_texts=size,
        chunk=chunk,
    )
    waiting = []
    for choose, (prompt, _, limit, pause, leaves) in zip(own, wanted, strict=True):
        options = DecodingOptions(choose, limit, prefill_step_size=chunk)
        waiting.append((pause, leaves, BatchText(list(PROMPTS[prompt]), options, wants_cache=True)))
    texts, given_out, pause = [text for _, _, text in waiting], {}, 0
    leaves_at = {id(text): leaves for _, leaves, text in waiting}
    while waiting or len(batch):
        while waiting and (pause >= waiting[0][0] or not len(batch)):
            batch.add(waiting.pop(0)[2])
            pause = 0
        pause += 1
        for part in batch.step():
            given_out[id(part.text)] = given_out.get(id(part.text), []) + part.produced.tokens
            at = leaves_at[id(part.text)]
            if at is not None and len(part.text.tokens) >= at and not part.text.ended:
                part.text.cache = batch.cache_of(part.text)
                batch.remove(part.text)
                batch.remove(part.text)  # of what has gone is nothing
        assert len(batch.running) <= size
    for text, (prompt, chooser, limit, _, leaves) in zip(texts, wanted, strict=True):
        expected = alone(module, prompt, chooser)
        assert given_out[id(text)] == text.tokens == expected[: len(text.tokens)]
        assert text.finish_reason == ("length" if len(text.tokens) == limit else "removed")
        assert leaves is not None or text.finish_reason == "length"
    # What went on in the caches while others joined and left shows in what follows.
    text, (prompt, chooser, *_) = texts[-1], wanted[-1]
    options, last = DecodingOptions(CHOOSERS[chooser], AFTER), mx.array([text.tokens[-1:]])
    rest = [step.tokens[0] for step in autoregressive(Target.of(model), last, text.cache, options)]
    assert rest == alone(module, prompt, chooser)[len(text.tokens) :][:AFTER]


def check(module, examples):
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(schedules(len(pair(module)[3])))
    def every(schedule):
        run(module, schedule)

    every()


@pytest.mark.parametrize("module", MODULES)
def test_a_text_is_the_same_in_any_company(module):
    """If this fails, a text depends on what is decoded beside it. (More schedules: the slow test below.)"""
    check(module, 12 if module == "llama" else 3)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_a_text_is_the_same_in_any_company_always(module):
    """The full claim."""
    check(module, 300 if module == "llama" else 40)
