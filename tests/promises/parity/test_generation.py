"""Whole generations on MLX against the PyTorch reference: same steps, same text."""

from __future__ import annotations

import mlx_redrafter  # isort: skip # noqa: F401 (before torch and mlx: it puts OpenBLAS in front of MLX's own BLAS)

import mlx.core as mx
import numpy as np
import pytest

from mlx_redrafter.decoding.loop import speculative
from mlx_redrafter.decoding.step import DecodingOptions, SpeculativeStep
from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.proposers import RecurrentProposer
from mlx_redrafter.drafting.shape import Drafted, DraftShape
from mlx_redrafter.text.loading import EMBEDDED

torch = pytest.importorskip("torch", reason="the PyTorch reference needs torch")

import torch_reference as reference  # noqa: E402
from support import always  # noqa: E402
from torch_reference.cases import (  # noqa: E402
    HIDDEN,
    VOCAB,
    memorised,
    random_targets,
    random_tree,
    read_prompts,
    to_candidate_tree,
)
from torch_reference.pairs import mlx_target, to_mlx, to_torch, torch_drafter, torch_target, worst  # noqa: E402


def assert_same_generation(model, verifier, theirs, ours, prompt, count, shape: DraftShape, expected=None) -> float:
    """The reference's two ways and MLX's agree, step by step; returns the mean acceptance length."""
    text, rows = expected or reference.plain(model, prompt, count)
    numbers = (shape.beam_width, shape.beam_length, shape.num_draft_tokens, shape.tree_policy)
    steps = reference.speculative(model, theirs, prompt, count, *numbers)
    assert [token for step in steps for token in step][:count] == text
    proposer, options = RecurrentProposer(ours, verifier.target.embed), DecodingOptions(max_tokens=count)
    produced = list(speculative(verifier, proposer, mx.array([prompt]), verifier.make_cache(), options, always(shape)))
    assert [part.tokens for part in produced] == steps
    logits = mx.concatenate([part.logits[: len(part.tokens)] for part in produced])[:count]
    assert worst(logits, rows) < 1e-3
    lengths = [len(step) for step in steps[1:]]
    return sum(lengths) / len(lengths)


def test_generation(targets):
    """If this fails, drafting changes the text, or a step accepts another number of tokens than it should."""
    model, verifier = targets
    prompt, count = [3, 1, 4, 1, 5, 9, 2, 6], 30
    expected = reference.plain(model, prompt, count)
    lengths = []
    for exit_dim, rnn in ((40, True), (2 * HIDDEN, False)):
        pair = memorised(model, prompt, expected[0], exit_dim, rnn, updates=15)
        for width, length, nodes, policy in (
            (1, 4, 3, "beams"),
            (2, 4, 3, "best-first"),
            (4, 5, 8, "best-first"),
            (4, 5, 16, "beams"),
        ):
            shape = DraftShape(width, length, nodes, policy)
            lengths.append(assert_same_generation(model, verifier, *pair, prompt, count, shape, expected))
    assert max(lengths) > 1.2  # drafts were accepted, so accepting them was tested
    assert min(lengths) < 4  # and rejected


def test_generation_from_several_layers(tmp_path):
    """If this fails, a head reads other hidden states of the target than those that its layers name."""
    model, verifier = random_targets(tmp_path, "grouped-tied", layers=4)
    prompt, count, layers = [3, 1, 4, 1, 5, 9, 2, 6], 30, (1, 3, 4)
    cache, hidden, _ = read_prompts(verifier, [prompt], layers)
    assert worst(hidden[0, -1], reference.read_sequence(model, prompt, layers)[0][-1]) < 1e-4
    tree = random_tree(np.random.default_rng(6), rows=9, vocab=VOCAB)
    hidden, _ = verifier(to_candidate_tree([tree]), cache, layers)
    assert worst(hidden[0], reference.verify(model, prompt, tree, layers)[0]) < 1e-4
    expected = reference.plain(model, prompt, count)
    pair = memorised(model, prompt, expected[0], 40, True, updates=15, layers=layers)
    means = [
        assert_same_generation(model, verifier, *pair, prompt, count, shape, expected)
        for shape in (DraftShape(1, 4, 3), DraftShape(3, 4, 6))
    ]
    assert 1.2 < max(means) < 4


def test_generation_from_a_long_prompt(targets):
    """If this fails, a cache that grows while trees are read loses or hides rows."""
    model, verifier = targets
    prompt, count = np.random.default_rng(7).integers(VOCAB, size=245).tolist(), 24
    expected = reference.plain(model, prompt, count)
    pair = memorised(model, prompt[-8:], expected[0], 40, True, updates=15)
    assert_same_generation(model, verifier, *pair, prompt, count, DraftShape(3, 4, 6), expected)


def test_steps_of_a_batch(targets):
    """If this fails, rows of a batch that accept different numbers of tokens disturb one another."""
    model, verifier = targets
    prompts = [[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8], [1, 1, 2, 3, 5, 8]]
    texts = [reference.plain(model, prompt, 20)[0] for prompt in prompts]
    theirs, ours = memorised(model, prompts[0], texts[0], 40, True, updates=20)
    cache, hidden, logits = read_prompts(verifier, prompts)
    proposer = RecurrentProposer(ours, verifier.target.embed)
    step = SpeculativeStep(verifier, proposer, DecodingOptions(), cache, hidden, mx.argmax(logits, axis=-1))
    found = [[[int(token)]] for token in step.root]
    for _ in range(6):
        submitted = step(Drafted(DraftShape(3, 4, 6)))
        for b, count in enumerate(submitted.count.tolist()):
            found[b].append(submitted.tokens[b, : count + 1].tolist())
    for prompt, text, steps in zip(prompts, texts, found):
        made = sum(map(len, steps))
        assert reference.speculative(model, theirs, prompt, made, 3, 4, 6, "best-first") == steps
        assert [token for step in steps for token in step][:20] == text[:made]
    assert len({sum(map(len, steps)) for steps in found}) > 1


def test_generation_of_stories(stories):
    """If this fails, a trained target with grouped heads of 8 dimensions is not decoded as PyTorch does."""
    model, verifier = torch_target(stories), mlx_target(stories)
    prompt, count = [1, 466, 465, 239, 467], 48  # "Once upon a time"
    expected = reference.plain(model, prompt, count)
    pair = memorised(model, prompt, expected[0], 96, True, updates=25)
    mean = assert_same_generation(model, verifier, *pair, prompt, count, DraftShape(3, 5, 7), expected)
    assert mean > 1.2


@pytest.mark.parametrize("draft", ["random", "embedded"])
def test_generation_of_the_embedded_target(draft):
    """If this fails, the pair that ships with the package does not write what PyTorch writes."""
    if draft == "embedded":
        ours = open_drafter(EMBEDDED / "drafter")
        if ours.config.quantization is None:
            ours.set_dtype(mx.float32)
        theirs = to_torch(ours)
    else:
        theirs = torch_drafter(4096, 384, 128, 1, True)
        ours = to_mlx(theirs)
    model, verifier = torch_target(EMBEDDED / "target"), mlx_target(EMBEDDED / "target")
    prompt = [500, 12, 340, 290, 1200, 77]
    count = 48 if draft == "embedded" else 8  # random drafts are never accepted: more steps show nothing more
    mean = assert_same_generation(model, verifier, theirs, ours, prompt, count, DraftShape(4, 5, 12))
    assert draft == "random" or mean > 1.2
