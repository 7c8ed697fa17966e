"""The cost-scaled target writes what the small one writes, and works as hard as it claims."""

import math

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_redrafter.benchmarks.cost_scale import bytes_per_token, scale_cost
from support import make_model

import mlx_redrafter
from mlx_redrafter import DraftShape, stream_generate
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.weights import weights


def same_texts(pair, scale, prefixes, max_tokens):
    small, drafter, tokenizer = pair
    large = mlx_redrafter.load(pack_weights=False)[0]
    assert scale_cost(large, scale) == pytest.approx(scale, rel=0.02)
    assert weights(large)[1] / weights(small)[1] == pytest.approx(scale, rel=0.02)
    for prefix in prefixes:
        for options in ({"drafter": drafter, "shape": DraftShape(4, 5, 7)}, {}):
            options["max_tokens"] = max_tokens
            runs = [list(stream_generate(model, tokenizer, prefix, **options)) for model in (small, large)]
            assert [r.token for r in runs[0]] == [r.token for r in runs[1]]
            assert runs[0][-1].steps == runs[1][-1].steps


def test_same_text_and_acceptance(pair, prefixes):
    """If this fails, the figures of the scaled target are those of another text."""
    same_texts(pair, 4, prefixes[:1], 24)


@pytest.mark.slow
def test_same_text_and_acceptance_everywhere(pair, prefixes):
    """The figures' own 20 texts of 128 tokens."""
    same_texts(pair, 8, prefixes[:20], 128)


def test_the_work_is_real():
    """If this fails, the added neurons cost less than real ones, or say something."""
    model, tokens = make_model(), mx.array([[5, 6, 7]])
    before = model(tokens)
    widths = [layer.mlp.gate_proj.weight.shape[0] for layer in model.layers]
    scale_cost(model, 4)
    for layer, width in zip(model.layers, widths):
        for name in ("gate_proj", "up_proj"):
            real, added = mx.split(getattr(layer.mlp, name).weight, [width])
            assert added.shape[0] > 0 and added.std().item() == pytest.approx(real.std().item(), rel=0.1)
        assert not layer.mlp.down_proj.weight[:, width:].any().item()
        assert layer.mlp.down_proj.weight.shape[1] == layer.mlp.gate_proj.weight.shape[0]
    assert mx.allclose(model(tokens), before, rtol=1e-5, atol=1e-5).item()


def test_an_embedding_that_is_no_head_is_not_read_per_token():
    model = make_model()  # untied
    assert bytes_per_token(model) == weights(model)[1] - model.model.embed_tokens.weight.nbytes
    tied = mlx_redrafter.load()[0]
    assert bytes_per_token(tied) == weights(tied)[1]


@pytest.mark.parametrize("scale", [0.5, 0, -1, math.nan, 1e9])
def test_scales_out_of_range(scale):
    with pytest.raises(UserError, match="--cost-scale is"):
        scale_cost(make_model(), scale)


def test_models_that_cannot_be_widened():
    model = make_model()
    nn.quantize(
        model,
        group_size=32,
        bits=8,
        class_predicate=lambda _, m: isinstance(m, nn.Linear) and m.weight.shape[1] % 32 == 0,
    )
    with pytest.raises(UserError, match="no feed-forward layers of"):
        scale_cost(model, 2)
    assert scale_cost(model, 1) == 1
