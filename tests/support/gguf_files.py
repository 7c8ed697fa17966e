"""GGUF files for tests, written as llama.cpp's converter writes them, from models of transformers."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

VOCABULARY = 320
SPECIAL = ["<|begin|>", "<|end|>", "<|eot_id|>", "<|eom_id|>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_ROPE = {"rope_type": "default", "rope_theta": 20000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
    "short_factor": [1.0] * 8,
    "original_max_position_embeddings": 8,
}
# Name -> general.architecture, transformers' classes, fields of the config.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", _COMMON | {"rope_parameters": _ROPE}),
    "llama-tied-biases": ("llama", "Llama", _COMMON | {"tie_word_embeddings": True, "attention_bias": True}),
    "llama3": ("llama", "Llama", _COMMON | {"rope_parameters": _LLAMA3, "head_dim": 32}),
    "llama-linear": ("llama", "Llama", _COMMON | {"rope_parameters": _ROPE | {"rope_type": "linear", "factor": 4.0}}),
    "mistral": ("llama", "Mistral", _COMMON | {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("qwen2", "Qwen2", _COMMON | {"rope_parameters": _ROPE}),
    "qwen3": ("qwen3", "Qwen3", _COMMON | {"head_dim": 32, "tie_word_embeddings": True}),
    "mixtral": ("llama", "Mixtral", _COMMON | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "qwen3moe",
        "Qwen3Moe",
        _COMMON
        | {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,  # as all of Qwen's are; no key tells
        },
    ),
    "gemma": ("gemma", "Gemma", _COMMON | {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        "Gemma2",
        _COMMON | {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True, "sliding_window": 64},
    ),
    "gemma3": (
        "gemma3",
        "Gemma3Text",
        _COMMON
        | {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
            "num_hidden_layers": 6,
            "sliding_window": 4,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", "Phi3", _COMMON | {"sliding_window": None}),
    "phi3-long": ("phi3", "Phi3", _COMMON | {"rope_parameters": _LONG, "original_max_position_embeddings": 8}),
    "smollm3": (
        "smollm3",
        "SmolLM3",
        _COMMON | {"num_hidden_layers": 4, "tie_word_embeddings": True, "no_rope_layers": [1, 1, 1, 0]},
    ),
}
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts": "ffn_down_exps",
}
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def random_model(name: str) -> torch.nn.Module:
    """A transformers model of MODELS in float32, every weight random, those of norms too."""
    _, kind, fields = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**fields)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            middle = 1.0 if "norm" in key and "gemma" not in name else 0.0
            torch.nn.init.normal_(value, middle, 0.15)
    return model


def write_gguf(name: str, model: torch.nn.Module, path: pathlib.Path, kind: str = "F32", **options) -> pathlib.Path:
    """Writes a model of MODELS.

    Args:
        kind: type of the matrices that its blocks divide.
        options: `metadata`, further keys or other values for keys (None leaves one out), `drop` and
            `extra` tensors, `raw` blocks and their types, and arguments of gguf.GGUFWriter.
    """
    metadata, extra, raw = (options.pop(key, {}) for key in ("metadata", "extra", "raw"))
    drop = options.pop("drop", ())
    arch = MODELS[name][0]
    writer = gguf.GGUFWriter(path, arch, **options)
    for key, value in (_metadata(name, model) | metadata).items():
        add_key(writer, key, value)
    for key, value in {**tensors(name, model), **extra}.items():
        if key not in drop and key not in raw:
            add_tensor(writer, key, value, kind if value.ndim > 1 else "F32")
    for key, (blocks, block_kind) in raw.items():
        writer.add_tensor(key, blocks, raw_dtype=gguf.GGMLQuantizationType[block_kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_key(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    if isinstance(value, list):
        writer.add_array(key, value)
    elif value is not None:
        kinds[type(value)](key, value)


def add_tensor(writer: gguf.GGUFWriter, name: str, value: np.ndarray, kind: str) -> None:
    quantized = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        writer.add_tensor(name, value.astype(np.float32 if kind == "F32" else np.float16))
    else:
        writer.add_tensor(name, gguf.quantize(value, quantized), raw_dtype=quantized)


def bytes_tokens() -> tuple[list[str], list[int], list[str]]:
    """Tokens, types and merges of a small byte-level vocabulary."""
    letters = list(bytes_to_unicode().values())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "Ċ Ċ", "Ġ Ġ"]
    tokens = letters + [merge.replace(" ", "") for merge in merges] + SPECIAL + ["<think>"]
    types = [1] * (len(tokens) - len(SPECIAL) - 1) + [3] * len(SPECIAL) + [4]
    padding = [f"[PAD{i}]" for i in range(len(tokens), VOCABULARY)]
    return tokens + padding, types + [5] * len(padding), merges


def _metadata(name: str, model: torch.nn.Module) -> dict[str, object]:
    arch, _, fields = MODELS[name]
    config = model.config
    rope = fields.get("rope_parameters", {"rope_theta": config.rope_parameters.get("rope_theta")})
    tokens, types, merges = bytes_tokens()
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    if (head := getattr(config, "head_dim", None)) and arch != "phi3":
        keys |= {"attention.key_length": head, "attention.value_length": head, "rope.dimension_count": head}
    if arch == "gemma3":
        keys |= {"rope.freq_base": rope["full_attention"]["rope_theta"], "attention.sliding_window": 4}
        rope = rope["full_attention"]
    elif rope["rope_theta"] is not None:
        keys["rope.freq_base"] = float(rope["rope_theta"])
    if experts := getattr(config, "num_local_experts", getattr(config, "num_experts", 0)):
        keys |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok}
        keys["expert_feed_forward_length"] = getattr(config, "moe_intermediate_size", None)
    if arch == "gemma2":
        keys |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 64}
    if rope.get("rope_type") == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    if rope.get("rope_type") == "longrope":
        keys["rope.scaling.original_context_length"] = 8
    return {f"{arch}.{key}": value for key, value in keys.items()} | {
        "general.name": f"small {name}",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<|begin|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
        "tokenizer.ggml.eot_token_id": tokens.index("<|eot_id|>"),
        "tokenizer.chat_template": TEMPLATE,
    }


def tensors(name: str, model: torch.nn.Module) -> dict[str, np.ndarray]:
    """llama.cpp's names and numbers."""
    arch, _, fields = MODELS[name]
    config = model.config
    names = _NAMES | (_GEMMA_NAMES if arch in ("gemma2", "gemma3") else {})
    found = {}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and fields["tie_word_embeddings"]:
            continue
        place, suffix = key.rsplit(".", 1)
        prefix, weight = "", value.numpy()
        if place.startswith("model.layers."):
            _, _, number, place = place.split(".", 3)
            prefix = f"blk.{number}."
        if suffix == "gate_up_proj":  # of all experts
            for part, each in zip(("gate", "up"), np.split(weight, 2, axis=1)):
                found[f"{prefix}ffn_{part}_exps.weight"] = np.ascontiguousarray(each)
            continue
        suffix = "weight" if place == "mlp.experts" else suffix
        if arch in ("llama", "smollm3") and place.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if place.endswith("q_proj") else config.num_key_value_heads
            weight = _interleave(weight, heads)
        if arch.startswith("gemma") and key.endswith("norm.weight"):
            weight = weight + 1
        found[f"{prefix}{names[place]}.{suffix}"] = weight
    rope = fields.get("rope_parameters", {})
    if rope.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = llama3_factors(config.head_dim, rope)
    if rope.get("rope_type") == "longrope":
        found["rope_factors_long.weight"] = np.array(rope["long_factor"], np.float32)
        found["rope_factors_short.weight"] = np.array(rope["short_factor"], np.float32)
    return found


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def llama3_factors(dims: int, rope: dict) -> np.ndarray:
    """What llama.cpp's converter writes as rope_freqs.weight."""
    factors = []
    for i in range(0, dims, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / dims)
        original = rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)
