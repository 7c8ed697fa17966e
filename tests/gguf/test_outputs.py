"""What a GGUF file holds is what the converted model holds, bit for bit where MLX has such weights."""

from __future__ import annotations

import json
import pathlib

import gguf
import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from support import gguf_files

from mlx_redrafter.gguf import write_model
from mlx_redrafter.gguf.file import read_gguf

DOWN = "blk.0.ffn_down.weight"
DOWN_HERE = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def model():
    return gguf_files.random_model("llama")


def convert(file: pathlib.Path, folder: pathlib.Path, **options):
    folder.mkdir()
    summary = write_model(file, folder, **options)
    return summary, mx.load(str(folder / "model.safetensors")), json.loads((folder / "config.json").read_text())


def in_file_order(weights: dict[str, mx.array], name: str, heads: int) -> mx.array:
    """A tensor of q or k with its rows as llama.cpp has them."""
    value = weights[name]
    return value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)


def same(left: mx.array, right: mx.array) -> bool:
    return left.dtype == right.dtype and mx.array_equal(left, right).item()


@pytest.mark.parametrize("kind, bits", [("Q4_0", 4), ("Q4_1", 4), ("Q8_0", 8)])
def test_packed_weights_bit_for_bit(model, tmp_path, kind, bits):
    file = gguf_files.write_gguf("llama", model, tmp_path / "model.gguf", kind)
    summary, weights, config = convert(file, tmp_path / "out")
    expected = mx.load(str(file))  # MLX's own reader of these types
    assert config["quantization"] == {"group_size": 32, "bits": bits, "mode": "affine"}
    assert summary.kept[kind] == 2 * 7 + 2 and not summary.changed
    for part in ("weight", "scales", "biases"):
        assert same(weights[f"model.embed_tokens.{part}"], expected[f"token_embd.{part}"])
        assert same(weights[f"{DOWN_HERE}.{part}"], expected[DOWN.replace("weight", part)])
        for letter, heads in (("q", 4), ("k", 2)):
            found = in_file_order(weights, f"model.layers.1.self_attn.{letter}_proj.{part}", heads)
            assert same(found, expected[f"blk.1.attn_{letter}.{part}"])
    tensor = read_gguf(file).tensors[DOWN]
    unpacked = mx.dequantize(
        weights[f"{DOWN_HERE}.weight"],
        weights[f"{DOWN_HERE}.scales"].astype(mx.float32),
        weights[f"{DOWN_HERE}.biases"].astype(mx.float32),
        group_size=32,
        bits=bits,
    )
    assert np.array_equal(np.array(unpacked), gguf.dequantize(tensor.rows, tensor.type))
    mlx_lm.load(str(tmp_path / "out"))


@pytest.mark.parametrize("kind, dtype", [("F32", mx.float32), ("F16", mx.float16), ("BF16", mx.bfloat16)])
def test_numbers_bit_for_bit(model, tmp_path, kind, dtype):
    file = gguf_files.write_gguf("llama", model, tmp_path / "model.gguf", kind)
    _, weights, config = convert(file, tmp_path / "out")
    tensor = read_gguf(file).tensors[DOWN]
    found = weights[f"{DOWN_HERE}.weight"]
    assert found.dtype == dtype and config["torch_dtype"] == str(dtype).removeprefix("mlx.core.")
    assert bytes(memoryview(found.view(mx.uint8))) == tensor.rows.tobytes()
    assert "quantization" not in config


def test_layers_of_other_bits_are_named(model, tmp_path):
    embedding = gguf.quantize(model.model.embed_tokens.weight.detach().numpy(), gguf.GGMLQuantizationType.Q8_0)
    raw = {"token_embd.weight": (embedding, "Q8_0")}
    file = gguf_files.write_gguf("llama", model, tmp_path / "model.gguf", "Q4_1", raw=raw)
    _, weights, config = convert(file, tmp_path / "out")
    assert config["quantization"]["bits"] == 4
    assert config["quantization"]["model.embed_tokens"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert weights["model.embed_tokens.weight"].shape == (gguf_files.VOCABULARY, 64 // 4)
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    assert (model.model.embed_tokens.bits, model.model.layers[0].mlp.down_proj.bits) == (8, 4)


def k_blocks(kind: str, rows: int) -> np.ndarray:
    """Random blocks of 256 weights, with scales that are numbers."""
    width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    blocks = np.random.default_rng(0).integers(0, 256, (rows, width), np.uint8)
    scales = np.frombuffer(np.array([0.01, 0.02], np.float16).tobytes(), np.uint8)
    if kind == "Q6_K":
        blocks[:, -2:] = scales[:2]
    else:
        blocks[:, :4] = scales
    return blocks


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_other_blocks_become_float16(model, tmp_path, kind):
    raw = {DOWN: (k_blocks(kind, 64), kind)}
    file = gguf_files.write_gguf("llama", model, tmp_path / "model.gguf", "Q5_0", raw=raw)
    summary, weights, config = convert(file, tmp_path / "out")
    assert summary.changed == {"Q5_0": 15, kind: 1} and config["torch_dtype"] == "float16"
    assert str(summary) == f"5 F32 exactly as in the file; 15 Q5_0, 1 {kind} dequantised to float16"
    tensor = read_gguf(file).tensors[DOWN]
    expected = gguf.dequantize(tensor.rows, tensor.type).astype(np.float16)
    assert np.array_equal(np.array(weights[f"{DOWN_HERE}.weight"]), expected)
    assert "quantization" not in config


def test_dequantised_in_float32_without_a_loss(model, tmp_path):
    file = gguf_files.write_gguf("llama", model, tmp_path / "model.gguf", "Q4_0")
    summary, weights, config = convert(file, tmp_path / "out", dequantize=True, dtype="float32")
    tensor = read_gguf(file).tensors[DOWN]
    assert np.array_equal(np.array(weights[f"{DOWN_HERE}.weight"]), gguf.dequantize(tensor.rows, tensor.type))
    assert {value.dtype for value in weights.values()} == {mx.float32}
    assert config["torch_dtype"] == "float32" and "quantization" not in config and summary.changed["Q4_0"] == 16


def test_scales_take_the_type_asked_for(model, tmp_path):
    file = gguf_files.write_gguf("llama", model, tmp_path / "model.gguf", "Q4_0")
    _, weights, _ = convert(file, tmp_path / "out", dtype="float32")
    expected = mx.load(str(file))["blk.0.ffn_down.biases"].astype(mx.float32)
    assert same(weights[f"{DOWN_HERE}.biases"], expected)
    assert weights["model.norm.weight"].dtype == mx.float32


@pytest.mark.parametrize("norm, dtype", [(1.5, mx.float16), (1.0 + 2**-20, mx.float32)])
def test_norms_are_float16_only_where_it_holds_them(model, tmp_path, norm, dtype):
    norms = [name for name in gguf_files.tensors("llama", model) if name.endswith("norm.weight")]
    extra = {name: np.full(64, 0.75, np.float32) for name in norms} | {"output_norm.weight": np.full(64, norm)}
    file = gguf_files.write_gguf("llama", model, tmp_path / "model.gguf", "Q4_0", extra=extra)
    _, weights, _ = convert(file, tmp_path / "out")
    assert np.array_equal(np.array(weights["model.norm.weight"].astype(mx.float32)), np.full(64, norm, np.float32))
    assert weights["model.norm.weight"].dtype == weights["model.layers.0.input_layernorm.weight"].dtype == dtype


def test_shards_hold_what_one_file_holds(model, tmp_path, monkeypatch):
    file = gguf_files.write_gguf("llama", model, tmp_path / "model.gguf", "Q8_0")
    _, expected, _ = convert(file, tmp_path / "one")
    monkeypatch.setattr("mlx_redrafter.gguf.model.SHARD_BYTES", 40_000)
    (tmp_path / "many").mkdir()
    write_model(file, tmp_path / "many")
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    found = {name: value for shard in shards for name, value in mx.load(str(shard)).items()}
    assert len(shards) > 2 and found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in found)
    mlx_lm.load(str(tmp_path / "many"))


def test_experts_stay_packed(tmp_path):
    """If this fails, a mixture of experts grows to its size in float16, or its experts change places."""
    file = gguf_files.write_gguf("mixtral", gguf_files.random_model("mixtral"), tmp_path / "model.gguf", "Q4_0")
    summary, packed, config = convert(file, tmp_path / "packed", dtype="float32")
    _, full, _ = convert(file, tmp_path / "full", dequantize=True, dtype="float32")
    name = "model.layers.1.block_sparse_moe.switch_mlp.down_proj"
    parts = [packed[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
    assert parts[0].shape == (4, 64, 256 * 4 // 32) and not summary.changed and config["quantization"]["bits"] == 4
    assert mx.allclose(mx.dequantize(*parts, group_size=32, bits=4), full[f"{name}.weight"], atol=1e-6)
    models = [mlx_lm.load(str(tmp_path / kind))[0] for kind in ("packed", "full")]
    logits = [model(mx.array([[5, 17, 200, 3]])) for model in models]
    assert mx.allclose(*logits, atol=1e-3)


def test_split_files_are_one_model(model, tmp_path):
    whole = gguf_files.write_gguf("llama", model, tmp_path / "model.gguf", "Q4_0")
    _, expected, _ = convert(whole, tmp_path / "one")
    gguf_files.write_gguf("llama", model, tmp_path / "part.gguf", "Q4_0", split_max_tensors=8)
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) == 3
    for i, part in enumerate(parts):  # any of them stands for all
        _, found, _ = convert(part, tmp_path / f"split{i}")
        assert all(same(found[name], expected[name]) for name in expected)


def test_real_file_bit_for_bit(assistant_file, tmp_path):
    """SmolLM2-135M-Instruct: Q4_1, and Q8_0 for the embedding."""
    summary, weights, config = convert(assistant_file, tmp_path / "out")
    assert summary.kept == {"Q4_1": 210, "F32": 61, "Q8_0": 1} and not summary.changed
    places = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    places |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
    places |= {"ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    seen = 0
    for name, expected in mx.load(str(assistant_file)).items():
        *block, place, part = name.split(".")
        if block:
            found = weights[here := f"model.layers.{block[1]}.{places[place]}.{part}"]
            if place in ("attn_q", "attn_k"):
                found = in_file_order(weights, here, 9 if place == "attn_q" else 3)
        else:
            found = weights[{"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[place] + f".{part}"]
        assert same(found.astype(expected.dtype), expected), name
        seen += 1
    assert seen == len(weights)
    assert config["eos_token_id"] == [2, 0] and config["tie_word_embeddings"]


@pytest.mark.slow
def test_real_file_says_the_same_in_4_bits_and_in_float32(assistant_file, tmp_path):
    for name, options in (("packed", {"dtype": "float32"}), ("full", {"dequantize": True, "dtype": "float32"})):
        convert(assistant_file, tmp_path / name, **options)
    packed, tokenizer = mlx_lm.load(str(tmp_path / "packed"))
    full, _ = mlx_lm.load(str(tmp_path / "full"))
    questions = [
        "Why is the sky blue?",
        "What is the capital of France?",
        "Write a line about the sea.",
        "How do I boil an egg?",
        "Name three planets.",
        "What is 12 + 30?",
        "Translate 'good morning' to Spanish.",
        "What is a prime number?",
        "Who wrote Hamlet?",
        "Give me a tip for learning to swim.",
    ]
    equal = 0
    for question in questions:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
        texts = [mlx_lm.generate(model, tokenizer, prompt, max_tokens=20) for model in (packed, full)]
        equal += texts[0] == texts[1]
    assert equal >= 8
