"""The recurrent head against its equations, and its files."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support import make_drafter

from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.redrafter import DrafterConfig
from mlx_redrafter.errors import UserError


def silu(x):
    return x / (1 + np.exp(-x))


def written_out(drafter, context, embeddings):
    """The equations of the module's docstring in NumPy: logits after reading all embeddings."""
    weights = {name: np.array(value) for name, value in tree_flatten(drafter.parameters())}
    state = np.zeros_like(embeddings[0])
    for e in embeddings:
        if drafter.config.rnn:
            state = silu(weights["rnn_w.weight"] @ e + weights["rnn_u.weight"] @ state + weights["rnn_u.bias"])
        else:
            state = e + state
    z = np.concatenate([context, state])
    if drafter.config.has_input_proj:
        joined = np.concatenate([weights["input_proj_context.weight"], weights["input_proj_state.weight"]], axis=1)
        z = joined @ z + weights["input_proj_context.bias"]
    for i in range(drafter.config.num_draft_layers):
        z = z + silu(weights[f"blocks.{i}.linear.weight"] @ z + weights[f"blocks.{i}.linear.bias"])
    return weights["lm_head.weight"] @ z


@pytest.mark.parametrize("rnn", [True, False])
@pytest.mark.parametrize("exit_dim", [64, 24])  # 64 = 2 * hidden: no input_proj, unless there are several layers
@pytest.mark.parametrize("layers", [(), (7,), (1, 4, 9)])
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_equations(rnn, exit_dim, layers, blocks):
    """If this fails, weights trained for ReDrafter draft something else than they were trained to."""
    drafter = make_drafter(rnn=rnn, exit_dim=exit_dim, num_draft_layers=blocks, context_layers=layers)
    assert drafter.config.has_input_proj == (exit_dim == 24 or len(layers) > 1)
    if rnn:
        drafter.rnn_u.bias = mx.random.normal((32,))
    context, embeddings = mx.random.normal((2, 32 * max(1, len(layers)))), mx.random.normal((2, 3, 32))
    projected, state = drafter.project_context(context), None
    for k in range(3):
        state = drafter.advance(embeddings[:, k], state)
    logits = np.array(drafter.logits(projected, state))
    for b in range(2):
        expected = written_out(drafter, np.array(context[b]), np.array(embeddings[b]))
        np.testing.assert_allclose(logits[b], expected, atol=1e-4)


def test_save_and_load(tmp_path):
    """If this fails, a trained drafter changes when it is saved."""
    drafter = make_drafter()
    drafter.save(tmp_path / "d")
    again = open_drafter(tmp_path / "d")
    state, context = mx.random.normal((1, 32)), mx.random.normal((1, 32))
    assert again.config == drafter.config
    assert mx.array_equal(
        again.logits(again.project_context(context), state), drafter.logits(drafter.project_context(context), state)
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_survives_saving(tmp_path, bits):
    """If this fails, quantised drafters cannot be kept on disk, or draft nonsense."""
    drafter = make_drafter(hidden=64, vocab=128, exit_dim=64)
    state, context = mx.random.normal((1, 64)), mx.random.normal((1, 64))
    exact = drafter.logits(drafter.project_context(context), state)
    drafter.quantize(group_size=32, bits=bits)
    drafter.save(tmp_path / "q")
    again = open_drafter(tmp_path / "q")
    assert again.config.quantization == {"group_size": 32, "bits": bits}
    found = again.logits(again.project_context(context), state)
    assert mx.array_equal(found, drafter.logits(drafter.project_context(context), state))
    error = mx.abs(found - exact).mean() / mx.abs(exact).mean()
    assert 0 < error.item() < (0.02 if bits == 8 else 0.3)


def test_quantising_needs_fitting_widths():
    with pytest.raises(UserError, match="--q-group-size is 64"):
        make_drafter().quantize(group_size=64)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"exit_dim": None}, "key 'exit_dim' is missing"),
        ({"hidden_size": "32"}, "hidden_size is '32', expected a whole number"),
        ({"num_draft_layers": -1}, "num_draft_layers is -1"),
        ({"rnn": "yes"}, "rnn is 'yes', expected true or false"),
        ({"model_type": "llama"}, "is a model of type 'llama', not a drafter"),
        ({"emb_norm": True}, "emb_norm"),
        ({"quantization": 4}, "quantization is 4"),
        ({"context_layers": [3, 2]}, r"context_layers is \[3, 2\], expected a list of rising numbers from 1 on"),
        ({"context_layers": []}, r"context_layers is \[\], expected"),
        ({"context_layers": 4}, "context_layers is 4, expected"),
        ({"prefix_window": 9, "prefix_layers": 0}, "prefix_layers is 0, expected a whole number from 1"),
        ({"prefix_layers": 2}, "prefix_layers is 2, which needs a prefix_window"),
        ({"context_layers": [1, 2]}, r"tensor 'input_proj_context.weight' has shape \(32, 32\), expected \(32, 64\)"),
        ({"vocab_size": 96}, r"tensor 'lm_head.weight' has shape \(97, 32\), expected \(96, 32\)"),
        (
            {"num_draft_layers": 3},
            "tensor 'blocks.2.linear.bias' is missing|tensor 'blocks.2.linear.weight' is missing",
        ),
        ({"num_draft_layers": 1}, "tensor 'blocks.1.linear.bias' does not belong"),
    ],
)
def test_bad_configs(tmp_path, change, message):
    """If this fails, a wrong config.json ends in a traceback or, worse, in a drafter that loads."""
    make_drafter().save(tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    with pytest.raises(UserError, match=message):
        open_drafter(tmp_path)


def test_bad_files(tmp_path):
    """If this fails, a damaged download is noticed late, or not at all."""
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        open_drafter(tmp_path)
    make_drafter().save(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=f"truncated, {len(whole) - 100} bytes found, {len(whole)} expected"):
        open_drafter(tmp_path)
    weights.write_bytes(b"hello")
    with pytest.raises(UserError, match="not a safetensors file"):
        open_drafter(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"model.safetensors: no such file"):
        open_drafter(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        open_drafter(tmp_path)


def test_config_round_trip():
    """If this fails, a drafter's config is not what was saved, or one like Apple's has keys that Apple's has not."""
    for layers in ((), (2, 5)):
        config = DrafterConfig(10, 4, 8, 1, True, context_layers=layers)
        written = json.loads(json.dumps(config.to_dict()))
        assert DrafterConfig.from_dict(written, "x") == config and ("context_layers" in written) == bool(layers)
    for deep in (1, 2):
        config = DrafterConfig(10, 4, 8, 1, False, prefix_window=9, prefix_layers=deep)
        written = json.loads(json.dumps(config.to_dict()))
        assert DrafterConfig.from_dict(written, "x") == config and ("prefix_layers" in written) == (deep > 1)
        assert written["rnn"] is False and written["num_draft_layers"] == 1


@pytest.mark.parametrize("quantised", [False, True])
def test_one_layer_of_prefix_attention_under_its_name_of_before(tmp_path, quantised):
    """If this fails, drafters that were trained when prefix attention had one layer cannot be read any more."""
    drafter = make_drafter(hidden=64, vocab=128, exit_dim=64, prefix_window=5)
    if quantised:
        drafter.quantize(group_size=32, bits=4)
    drafter.save(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = mx.load(str(file))
    old = {name.replace("prefix.layers.0.", "prefix.layer."): value for name, value in weights.items()}
    assert len(old.keys() - weights.keys()) == (23 if quantised else 9)
    mx.save_safetensors(str(file), old)
    again, rows = open_drafter(tmp_path), (mx.random.normal((1, 7, 64)), mx.random.normal((1, 7, 64)))
    assert mx.array_equal(again.prefix(*rows), drafter.prefix(*rows))
    again.save(tmp_path / "new")
    assert mx.load(str(tmp_path / "new" / "model.safetensors")).keys() == weights.keys()
