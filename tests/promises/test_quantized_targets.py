"""Quantised targets of every mlx-lm mode, adapters and sharded files: detected, and the same text."""

import json
import pathlib
import shutil

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.generate import generate_step
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_tokenizer, quantize_model
from mlx_redrafter.benchmarks.architectures.small_models import build
from support import make_drafter, make_model

import mlx_redrafter
from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import CHAIN, TREE
from mlx_redrafter.text.loading import EMBEDDED

HIDDEN = 64
PROMPT = [3, 14, 15, 92, 65, 35]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def tokenizer():
    found = load_tokenizer(EMBEDDED / "target")
    found.eos_token_ids = []
    return found


def write(folder: pathlib.Path, model, config, shards=1):
    """A model directory as mlx-lm writes it."""
    folder.mkdir(parents=True)
    weights = list(tree_flatten(model.parameters()))
    names, where = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)], {}
    for i, name in enumerate(names if shards > 1 else ["model.safetensors"]):
        mx.save_safetensors(str(folder / name), dict(weights[i::shards]), {"format": "mlx"})
        where |= {key: name for key, _ in weights[i::shards]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER_FILES:
        if (EMBEDDED / "target" / name).exists():
            shutil.copy(EMBEDDED / "target" / name, folder / name)


def config_of(model):
    return {key: value for key, value in vars(model.args).items() if value is not None}


def assert_same_text(model, tokenizer, capability=TREE, tokens=24):
    expected = [int(token) for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=tokens)]
    verifier = verifier_of(model)
    assert verifier.capability == capability, verifier.reason
    drafter = make_drafter(vocab=verifier.target.vocab_size, hidden=HIDDEN, exit_dim=HIDDEN)
    found = mlx_redrafter.stream_generate(
        model, tokenizer, PROMPT, drafter, max_tokens=tokens, shape=DraftShape(3, 4, 8)
    )
    responses = list(found)
    assert [r.token for r in responses][:tokens] == expected
    assert responses[-1].method != "plain"


@pytest.mark.parametrize(
    "mode, bits, group_size",
    [*(("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)), ("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)],
)
def test_modes(tmp_path, tokenizer, mode, bits, group_size):
    """If this fails, a quantised target loses its drafts, or writes another text with them."""
    model = make_model(hidden=HIDDEN)
    model, config = quantize_model(model, config_of(model), group_size, bits, mode=mode)
    write(tmp_path / "model", model, config)
    loaded, _, _ = mlx_redrafter.load(str(tmp_path / "model"))
    assert mx.array_equal(loaded.lm_head.weight, model.lm_head.weight) and loaded.lm_head.mode == mode
    assert_same_text(loaded, tokenizer)


def test_mixed_bits(tmp_path, tokenizer):
    """If this fails, recipes that give some layers more bits than others are not understood."""
    model = build("llama")
    predicate = mixed_quant_predicate_builder("mixed_3_6", model, group_size=32)
    model, config = quantize_model(model, config_of(model), 32, 3, quant_predicate=predicate)
    assert len({m.bits for m in model.modules() if hasattr(m, "bits")}) == 2
    write(tmp_path / "model", model, config)
    loaded, _, _ = mlx_redrafter.load(str(tmp_path / "model"))
    assert_same_text(loaded, tokenizer)


def test_a_quantised_hybrid(tokenizer):
    """If this fails, the states of quantised mixers are taken back wrongly."""
    model = build("qwen3_next")
    model, _ = quantize_model(model, {}, 32, 4)
    assert_same_text(model, tokenizer, CHAIN)


def test_shards(tmp_path, tokenizer):
    model = make_model(hidden=HIDDEN)
    write(tmp_path / "model", model, config_of(model), shards=3)
    loaded, _, _ = mlx_redrafter.load(str(tmp_path / "model"))
    assert_same_text(loaded, tokenizer)
    (tmp_path / "model" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003.safetensors: no such file"):
        mlx_redrafter.load(str(tmp_path / "model"))


@pytest.mark.parametrize("bits", [None, 4])
def test_adapters(tmp_path, tokenizer, bits):
    """If this fails, adapters are ignored, or only plain decoding has them."""
    model = make_model(hidden=HIDDEN)
    config = config_of(model)
    if bits:
        model, config = quantize_model(model, config, 32, bits)
    write(tmp_path / "model", model, config)
    shape = {"rank": 4, "scale": 8.0, "dropout": 0.0}
    linear_to_lora_layers(model, 2, shape)
    mx.random.seed(3)
    adapters = {
        key: 0.2 * mx.random.normal(value.shape) for key, value in tree_flatten(model.parameters()) if "lora" in key
    }
    (tmp_path / "adapter").mkdir()
    mx.save_safetensors(str(tmp_path / "adapter" / "adapters.safetensors"), adapters)
    fields = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": shape}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    without, _, _ = mlx_redrafter.load(str(tmp_path / "model"))
    loaded, _, _ = mlx_redrafter.load(str(tmp_path / "model"), adapter_path=str(tmp_path / "adapter"))
    tokens = mx.array([PROMPT])
    assert not mx.allclose(loaded(tokens), without(tokens), atol=1e-2)
    assert_same_text(loaded, tokenizer)


def test_adapters_of_another_model(tmp_path):
    """If this fails, a user's mistake is a traceback."""
    model = make_model(hidden=HIDDEN)
    write(tmp_path / "model", model, config_of(model))
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UserError, match="adapter"):
        mlx_redrafter.load(str(tmp_path / "model"), adapter_path=str(tmp_path / "adapter"))
