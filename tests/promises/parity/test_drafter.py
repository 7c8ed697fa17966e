"""The drafter on MLX against the PyTorch reference: same weights, same numbers."""

from __future__ import annotations

import mlx_redrafter  # isort: skip # noqa: F401 (before torch and mlx: it puts OpenBLAS in front of MLX's own BLAS)

import json

import mlx.core as mx
import pytest
from mlx_redrafter.convert.drafter import convert_drafter

from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.redrafter import DrafterConfig, RecurrentDrafter

torch = pytest.importorskip("torch", reason="the PyTorch reference needs torch")

import torch_reference as reference  # noqa: E402
from torch_reference.cases import HIDDEN, VOCAB, random_contexts  # noqa: E402
from torch_reference.pairs import renamed, to_mlx, to_numpy, to_torch, torch_drafter, worst  # noqa: E402


def test_drafter_logits(drafters, embedding):
    """If this fails, the recurrence or the head is another function than the weights were trained for."""
    theirs, ours = drafters
    assert_same_logits(theirs, ours, embedding, random_contexts(3)[0])


@pytest.mark.parametrize("exit_dim", [40, 2 * HIDDEN])
def test_logits_from_several_layers(exit_dim, embedding):
    """If this fails, the projection of a context of several layers is another one than was trained."""
    theirs = torch_drafter(VOCAB, HIDDEN, exit_dim, 1, True, layers=(8, 15, 22))
    contexts = torch.cat([random_contexts(3)[0].roll(n, dims=-1) for n in range(3)], dim=-1)
    assert_same_logits(theirs, to_mlx(theirs), embedding, contexts)


def assert_same_logits(theirs, ours, embedding, contexts):
    table, rows = embedding
    tokens = torch.randint(VOCAB, (4, 3), generator=torch.Generator().manual_seed(4))
    projected = ours.project_context(mx.array(to_numpy(contexts)))
    state, our_state = theirs.first_state(contexts[:, :HIDDEN]), None
    for step in tokens:
        state = theirs.advance(table(step.to(reference.DEVICE)), state)
        our_state = ours.advance(rows(mx.array(step.numpy())), our_state)
        assert worst(our_state, state) < 1e-4
        assert worst(ours.logits(projected, our_state), theirs.logits(contexts, state)) < 1e-4


def test_input_projection_splits_into_context_then_state():
    """If this fails, the halves of Apple's input_proj are the wrong way round: drafts from real weights are noise."""
    theirs = torch_drafter(VOCAB, HIDDEN, 40, 2, True)
    contexts, _ = random_contexts(2)
    states = contexts.flip(-1) + 0.5
    h, s = mx.array(to_numpy(contexts)), mx.array(to_numpy(states))
    config = DrafterConfig(VOCAB, HIDDEN, 40, 2, True)
    errors = []
    for h_first in (True, False):
        ours = RecurrentDrafter(config).fill(renamed(theirs, h_first), "the reference")
        errors.append(worst(ours.logits(ours.project_context(h), s), theirs.logits(contexts, states)))
    assert errors[0] < 1e-4
    assert errors[1] > 0.1  # the weights tell the halves apart


def test_quantized_drafter():
    """If this fails, a quantised drafter is another function than its own weights, unpacked."""
    ours = to_mlx(torch_drafter(VOCAB, 64, 96, 2, True))
    ours.quantize(group_size=32, bits=4)
    theirs = to_torch(ours)
    h, s = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(8)).to(reference.DEVICE)
    state = ours.advance(mx.array(to_numpy(h)), mx.array(to_numpy(s)))
    assert worst(state, theirs.advance(h, s)) < 1e-4
    logits = ours.logits(ours.project_context(mx.array(to_numpy(h))), mx.array(to_numpy(s)))
    assert worst(logits, theirs.logits(h, s)) < 1e-4


def test_converted_checkpoint(drafters, embedding, tmp_path):
    """If this fails, `convert drafter` gives Apple's tensors to the wrong places."""
    theirs, _ = drafters
    config = {
        "model_type": "recurrent_drafting_drafter",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "exit_dim": theirs.exit_dim,
        "num_draft_layers": theirs.num_draft_layers,
        "rnn": theirs.rnn,
    }
    (tmp_path / "apple").mkdir()
    (tmp_path / "apple" / "config.json").write_text(json.dumps(config))
    torch.save(theirs.state_dict(), tmp_path / "apple" / "model.pt")
    ours = open_drafter(convert_drafter(str(tmp_path / "apple"), str(tmp_path / "converted")))
    contexts, roots = random_contexts(2)
    table, rows = embedding
    state = theirs.advance(table(torch.tensor(roots, device=contexts.device)), theirs.first_state(contexts))
    our_state = ours.advance(rows(mx.array(roots)), None)
    projected = ours.project_context(mx.array(to_numpy(contexts)))
    assert worst(ours.logits(projected, our_state), theirs.logits(contexts, state)) < 1e-4
