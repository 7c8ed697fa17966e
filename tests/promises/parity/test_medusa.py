"""Medusa on MLX against the PyTorch reference: same weights, same candidates, same steps."""

from __future__ import annotations

import json
import pathlib

import mlx_redrafter  # before torch and mlx: it puts OpenBLAS in front of MLX's own BLAS

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from mlx_redrafter.convert.drafter import convert_drafter
from tokenizers import Tokenizer

from mlx_redrafter.decoding.loop import speculative
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.medusa import MedusaHeads
from mlx_redrafter.drafting.medusa_tree import PUBLISHED
from mlx_redrafter.drafting.proposers import MedusaProposer
from mlx_redrafter.drafting.shape import Drafted, DraftShape

torch = pytest.importorskip("torch", reason="the PyTorch reference needs torch")

import torch_reference as reference  # noqa: E402
from support import always  # noqa: E402
from torch_reference import medusa  # noqa: E402
from torch_reference.pairs import mlx_target, torch_target, worst  # noqa: E402

EMBEDDED = pathlib.Path(mlx_redrafter.__file__).parent / "embedded"
PROMPT = Tokenizer.from_file(str(EMBEDDED / "target" / "tokenizer.json")).encode("def read_lines(path):\n").ids
SHAPES = [  # and the choices that they stand for
    (DraftShape(16, 5, 63), list(PUBLISHED)),
    (DraftShape(3, 4, 6), [(0,), (0, 0), (1,), (0, 1), (2,), (0, 0, 0)]),
    (DraftShape(1, 4, 3), [(0,), (0, 0), (0, 0, 0)]),
]


@pytest.fixture(scope="module")
def target():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch_target(EMBEDDED / "target"), mlx_target(EMBEDDED / "target")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[1, 2])
def heads(request, target, tmp_path_factory) -> tuple[medusa.MedusaHeads, MedusaHeads, list[int]]:
    """Heads that know a text a little, converted from a file as it is published, and that text."""
    model, _ = target
    text, _ = reference.plain(model, PROMPT, 24)
    torch.manual_seed(request.param)
    theirs = medusa.MedusaHeads(4096, 384, 4, request.param).to(reference.DEVICE)
    medusa.memorise_heads(theirs, model, PROMPT + text[:14], updates=6)
    folder = tmp_path_factory.mktemp("medusa") / "published"
    folder.mkdir()
    torch.save(theirs.state_dict(), folder / "medusa_lm_head.pt")
    fields = {"medusa_num_heads": 4, "medusa_num_layers": request.param, "base_model_name_or_path": "a/b"}
    (folder / "config.json").write_text(json.dumps(fields))
    ours = open_drafter(convert_drafter(str(folder), str(folder.parent / "mlx")))
    assert isinstance(ours, MedusaHeads)
    return theirs, ours, text


def test_scores(heads):
    """If this fails, a head computes something else than its weights say."""
    theirs, ours, _ = heads
    context = torch.randn(5, 384, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([head(context.to(reference.DEVICE)) for head in theirs], dim=1)
    assert worst(ours(mx.array(context.numpy())), expected) < 1e-3


@pytest.mark.parametrize(
    "shape, choices", SHAPES, ids=lambda value: str(value) if isinstance(value, DraftShape) else ""
)
def test_trees_and_steps(target, heads, shape, choices):
    """If this fails, the tree has other candidates than the choices say, or steps accept other tokens."""
    model, verifier = target
    theirs, ours, text = heads
    proposer = MedusaProposer(ours)
    context = np.random.default_rng(0).normal(size=384).astype(np.float32)
    found = proposer.propose(mx.array(context)[None], mx.array([77]), Drafted(shape))
    expected = medusa.medusa_tree(theirs, torch.from_numpy(context).to(reference.DEVICE), 77, choices)
    for field in ("tokens", "parents", "depths", "ancestors"):
        assert getattr(found, field)[0].tolist() == getattr(expected, field), field
    steps = medusa.medusa_decoding(model, theirs, PROMPT, 24, choices)
    options = DecodingOptions(max_tokens=24)
    produced = speculative(verifier, proposer, mx.array([PROMPT]), verifier.make_cache(), options, always(shape))
    assert [part.tokens for part in produced] == steps
    assert [token for step in steps for token in step][:24] == text[:24]
    assert max(map(len, steps)) > 1 and min(map(len, steps[1:-1])) < 1 + max(map(len, choices))
