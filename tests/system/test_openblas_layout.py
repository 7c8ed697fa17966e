"""Weights laid out as panels: the same numbers, the same texts, and a layout that is used only where it pays.

A packed model stays mlx-lm's. Looked for: save_model, load_weights, assigning a weight, adapters, training, quantising,
set_dtype, deepcopy, each packed and not.
"""

import copy

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import get_total_parameters, quantize_model, save_model

from mlx_redrafter import DraftShape, generate, load
from mlx_redrafter.system import openblas_layout
from mlx_redrafter.system.openblas_layout import (
    PackedEmbedding,
    PackedLinear,
    from_panels,
    pack,
    panel_shape,
    to_panels,
)
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.output_layer import output_layer
from mlx_redrafter.text.loading import EMBEDDED


@pytest.fixture
def faster(monkeypatch):
    monkeypatch.setattr(openblas_layout, "_faster", True)


@pytest.mark.parametrize(("rows", "depth"), [(128, 384), (96, 1024), (64, 8192), (192, 2 * 298 * 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_computes_the_same(rows, depth, bias):
    mx.random.seed(rows + depth)
    layer = nn.Linear(depth, rows, bias=bias)
    shape = panel_shape(layer.weight)
    assert shape is not None
    packed = PackedLinear(layer, to_panels(layer.weight, *shape))
    assert packed.weight.shape == layer.weight.shape and mx.array_equal(packed.weight, layer.weight)
    for lead in [(1,), (13,), (2, 5), (1, 1), (3, 1, 40)]:
        x = mx.random.normal((*lead, depth))
        found, expected = packed(x), layer(x)
        assert found.shape == expected.shape
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pieces", [1, 4])
def test_a_packed_embedding_is_a_table_and_an_output_layer(pieces):
    mx.random.seed(0)
    layer = nn.Embedding(192, 256)
    packed = PackedEmbedding(layer, to_panels(layer.weight, 64, pieces))
    for ids in (mx.array(7), mx.array([0, 191, 64]), mx.array([[3, 65], [127, 128]])):
        assert packed(ids).shape == layer(ids).shape and mx.array_equal(packed(ids), layer(ids))
    x = mx.random.normal((1, 3, 256))
    np.testing.assert_allclose(np.array(packed.as_linear(x)), np.array(layer.as_linear(x)), rtol=1e-4, atol=1e-4)


def test_single_panels_stay_below_openblas_s_limit():
    for rows, depth in [(4096, 384), (384, 1024), (384, 8192), (64, 9536), (4096, 4096), (32, 1200)]:
        width, pieces = panel_shape(mx.zeros((rows, depth)))
        assert rows % width == 0 and depth % pieces == 0
        assert 24 * width * (depth // pieces) <= 1_000_000


@pytest.mark.parametrize(
    "weight",
    [mx.zeros((100, 384)), mx.zeros((64, 2 * 997)), mx.zeros((64, 384), mx.bfloat16), mx.zeros((64, 384), mx.float16)],
    ids=["no whole panels", "no whole pieces", "bfloat16", "float16"],
)
def test_what_panels_do_not_suit_is_left_alone(weight, faster):
    model = nn.Sequential(nn.Linear(*weight.shape[::-1], bias=False))
    model.layers[0].weight = weight
    assert type(pack(model).layers[0]) is nn.Linear


def test_quantised_layers_are_left_alone(faster):
    model = nn.Sequential(nn.Linear(384, 128), nn.Linear(384, 128).to_quantized())
    pack(model)
    assert [type(layer) for layer in model.layers] == [PackedLinear, nn.QuantizedLinear]


def test_nothing_is_packed_where_it_is_not_faster(monkeypatch):
    monkeypatch.setattr(openblas_layout, "_faster", False)
    model, drafter, _ = load()
    modules = [*model.modules(), *drafter.modules()]
    assert not any(isinstance(module, (PackedLinear, PackedEmbedding)) for module in modules)


def test_whether_it_is_faster_is_asked_only_where_openblas_multiplies(monkeypatch):
    monkeypatch.setattr(openblas_layout, "_faster", None)
    monkeypatch.setattr(openblas_layout, "openblas_is_loaded", lambda: False)
    monkeypatch.setattr(openblas_layout, "_compare", lambda: pytest.fail("compared"))
    assert openblas_layout.panels_are_faster() is False


def test_texts_are_those_of_the_usual_layout(faster):
    packed, usual = load(), load(pack_weights=False)
    assert isinstance(packed[0].model.layers[0].mlp.gate_proj, PackedLinear)
    assert isinstance(packed[0].model.embed_tokens, PackedEmbedding)
    assert isinstance(packed[1].lm_head, PackedLinear)
    assert type(usual[0].model.layers[0].mlp.gate_proj) is nn.Linear
    for prompt in ("import os\n", "class Parser:\n    def __init__(self"):
        texts = {
            generate(model, tokenizer, prompt, drafter=drafter, max_tokens=48, shape=shape)
            for (model, drafter, tokenizer) in (packed, usual)
            for shape in (DraftShape(1, 4, 3), DraftShape(4, 5, 12))
        }
        texts.add(generate(usual[0], usual[2], prompt, max_tokens=48))
        assert len(texts) == 1


@pytest.mark.parametrize("some", [False, True])
def test_the_output_layer_of_a_packed_target(some, faster):
    targets = [Target(load(pack_weights=each)[0]) for each in (True, False)]
    ids = mx.array([5, 3, 4000] * 64) if some else None
    packed, usual = (output_layer(target, ids) for target in targets)
    assert isinstance(packed, PackedLinear) and type(usual) is nn.Linear
    assert mx.array_equal(packed.weight, usual.weight)
    if not some:  # shared, not copied
        table = targets[0].model.model.embed_tokens.panels
        assert mx.array_equal(from_panels(table), packed.weight) and packed.panels is table
    x = mx.random.normal((1, 2, 384), key=mx.random.key(1))
    np.testing.assert_allclose(np.array(packed(x)), np.array(usual(x)), rtol=1e-4, atol=1e-4)


def _step(model):
    """One step of training on a made-up text; the loss."""
    ids = mx.array([[5, 3, 400, 7]])

    def loss(model):
        return mx.mean(nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]))

    value, gradients = nn.value_and_grad(model, loss)(model)
    optim.SGD(0.001).update(model, gradients)
    mx.eval(model.parameters(), value)
    return value.item()


def _loaded(packed, monkeypatch):
    monkeypatch.setattr(openblas_layout, "_faster", packed)
    model, _, _ = load(draft="none")
    assert isinstance(model.model.layers[0].mlp.gate_proj, PackedLinear) is packed
    return model


@pytest.mark.parametrize("packed", [True, False])
def test_what_load_returns_is_saved_as_mlx_lm_saves(packed, monkeypatch, tmp_path):
    """If this fails, a model that was loaded here and saved by mlx-lm cannot be loaded by anything."""
    model = _loaded(packed, monkeypatch)
    save_model(tmp_path, model)
    weights, expected = (
        mx.load(str(tmp_path / "model.safetensors")),
        mx.load(str(EMBEDDED / "target/model.safetensors")),
    )
    assert weights.keys() == expected.keys()
    assert all(mx.array_equal(weights[name], value.astype(mx.float32)) for name, value in expected.items())
    assert get_total_parameters(model) == sum(value.size for value in expected.values())


@pytest.mark.parametrize("packed", [True, False])
def test_what_load_returns_takes_weights(packed, monkeypatch):
    """If this fails, weights that are loaded or assigned are refused, or the old ones go on answering."""
    model, ids = _loaded(packed, monkeypatch), mx.array([[5, 3, 400]])
    zero = [(name, mx.zeros_like(value)) for name, value in tree_flatten(model.parameters())]
    model.load_weights(zero)
    assert not mx.any(model(ids)).item() and dict(tree_flatten(model.parameters())).keys() == dict(zero).keys()
    layer = _loaded(packed, monkeypatch).model.layers[0].mlp.gate_proj
    layer.weight = mx.ones_like(layer.weight)
    assert mx.allclose(layer(mx.ones((1, 1, 384))), mx.full((1, 1, 1024), 384.0)).item()
    half = _loaded(packed, monkeypatch)
    half.set_dtype(mx.bfloat16)
    assert half(ids).dtype == mx.bfloat16


@pytest.mark.parametrize("packed", [True, False])
def test_what_load_returns_is_adapted_trained_and_quantised(packed, monkeypatch):
    """If this fails, a loaded model is not mlx-lm's any more: LoRA, full training or quantisation fail on it."""
    first = _step(_loaded(packed, monkeypatch))
    full = _loaded(packed, monkeypatch)
    losses = [_step(full) for _ in range(3)]
    assert losses[0] == pytest.approx(first) and losses[2] < losses[0]
    lora = _loaded(packed, monkeypatch)
    lora.freeze()
    linear_to_lora_layers(lora, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0})
    names = {name.rpartition(".")[2] for name, _ in tree_flatten(lora.trainable_parameters())}
    assert names == {"lora_a", "lora_b"}
    losses = [_step(lora) for _ in range(3)]
    assert losses[0] == pytest.approx(first, rel=1e-4) and losses[2] < losses[0]
    nn.quantize(full, group_size=32, bits=8)
    assert isinstance(full.model.embed_tokens, nn.QuantizedEmbedding)
    assert {"weight", "scales"} <= full.model.layers[0].mlp.gate_proj.parameters().keys()
    _, config = quantize_model(_loaded(packed, monkeypatch), {}, 32, 4)
    assert config["quantization"]["bits"] == 4
    other = copy.deepcopy(_loaded(packed, monkeypatch))
    assert _step(other) == pytest.approx(first, rel=1e-4)
