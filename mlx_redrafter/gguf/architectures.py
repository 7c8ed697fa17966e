"""The architectures that are read: their config fields, and what llama.cpp does to their weights.

transformers' own table (`transformers.integrations.ggml`) covers neither rope scaling nor soft-caps nor
head sizes, and its place moves between versions; the fields that it has are the ones of `_common`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from mlx_redrafter.errors import UserError
from mlx_redrafter.gguf.file import GGUF
from mlx_redrafter.gguf.rope import rope_scaling

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One value of general.architecture, of dense models or of mixtures of experts.

    Attributes:
        model_type, hf_class: transformers' names.
        fields: what its config has beyond the common fields; reads the file and the common fields.
        permuted: llama.cpp has the rows of q and k in pairs that rotate together.
        shifted_norms: llama.cpp has added 1 to the weights of norms.
    """

    model_type: str
    hf_class: str
    fields: Callable[[GGUF, dict[str, Any]], dict[str, Any]]
    permuted: bool = False
    shifted_norms: bool = False


def architecture(file: GGUF) -> Architecture:
    """That of a file. Raises UserError where it is none of those read here."""
    name = file.get("general.architecture", str)
    experts = file.get(f"{name}.expert_count", int, 0)
    if found := (MIXTURES if experts else ARCHITECTURES).get(name):
        return found
    known = ", ".join(MIXTURES if experts else ARCHITECTURES)
    what = f" with {experts} experts" if experts else ""
    raise UserError(f"{file.path}: general.architecture is {name!r}{what}, expected one of {known}")


def config(file: GGUF) -> dict[str, Any]:
    """The config.json of a file, without quantisation and end tokens.

    Raises:
        UserError: naming the key that is missing or of the wrong kind.
    """
    arch = architecture(file)
    fields = _common(file)
    fields |= arch.fields(file, fields)
    dims = fields.get("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    dims = int(dims * fields.get("partial_rotary_factor", 1.0))
    fields |= rope_scaling(file, file.metadata["general.architecture"], fields, dims)
    return {"architectures": [arch.hf_class], "model_type": arch.model_type} | fields


def _common(file: GGUF) -> dict[str, Any]:
    name = file.metadata["general.architecture"]
    embedding = file.tensor(EMBEDDING)
    heads = file.get(f"{name}.attention.head_count", int)
    if heads < 1:
        raise UserError(f"{file.path}: {name}.attention.head_count is {heads}, expected at least 1")
    return {
        "hidden_size": file.get(f"{name}.embedding_length", int),
        "intermediate_size": file.get(f"{name}.feed_forward_length", int),
        "num_hidden_layers": file.get(f"{name}.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get(f"{name}.attention.head_count_kv", int, heads),
        "rms_norm_eps": file.get(f"{name}.attention.layer_norm_rms_epsilon", float),
        "max_position_embeddings": file.get(f"{name}.context_length", int),
        "rope_theta": file.get(f"{name}.rope.freq_base", float, 10000.0),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": OUTPUT not in file.tensors,
        "hidden_act": "silu",
    }


def _head_dim(file: GGUF, fields: dict[str, Any]) -> dict[str, Any]:
    usual = fields["hidden_size"] // fields["num_attention_heads"]
    return {"head_dim": file.get(f"{file.metadata['general.architecture']}.attention.key_length", int, usual)}


def _llama(file: GGUF, fields: dict[str, Any]) -> dict[str, Any]:
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_down.bias"}
    return _head_dim(file, fields) | {key: tensor in file.tensors for key, tensor in biases.items()}


def _qwen2(file: GGUF, fields: dict[str, Any]) -> dict[str, Any]:
    return {"use_sliding_window": False}


def _qwen3(file: GGUF, fields: dict[str, Any]) -> dict[str, Any]:
    return _head_dim(file, fields) | {"attention_bias": False, "use_sliding_window": False}


def _smollm3(file: GGUF, fields: dict[str, Any]) -> dict[str, Any]:
    every = 4  # llama.cpp's; no key tells it
    layers = [int((i + 1) % every != 0) for i in range(fields["num_hidden_layers"])]
    return _llama(file, fields) | {"no_rope_layer_interval": every, "no_rope_layers": layers}


def _mixtral(file: GGUF, fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_local_experts": file.get("llama.expert_count", int),
        "num_experts_per_tok": file.get("llama.expert_used_count", int),
    }


def _qwen3_moe(file: GGUF, fields: dict[str, Any]) -> dict[str, Any]:
    return _qwen3(file, fields) | {
        "num_experts": file.get("qwen3moe.expert_count", int),
        "num_experts_per_tok": file.get("qwen3moe.expert_used_count", int),
        "moe_intermediate_size": file.get("qwen3moe.expert_feed_forward_length", int),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }


def _gemma1(file: GGUF, fields: dict[str, Any]) -> dict[str, Any]:
    activation = "gelu_pytorch_tanh"
    return _head_dim(file, fields) | {"hidden_act": activation, "hidden_activation": activation}


def _gemma2(file: GGUF, fields: dict[str, Any]) -> dict[str, Any]:
    return _gemma(file, fields, 46) | {
        "attn_logit_softcapping": file.get("gemma2.attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": file.get("gemma2.final_logit_softcapping", float, 30.0),
        "sliding_window": file.get("gemma2.attention.sliding_window", int, 4096),
    }


def _gemma3(file: GGUF, fields: dict[str, Any]) -> dict[str, Any]:
    return _gemma(file, fields, 62) | {
        "rope_local_base_freq": file.get("gemma3.rope.freq_base_swa", float, 10000.0),
        "sliding_window": file.get("gemma3.attention.sliding_window", int),
        "sliding_window_pattern": file.get("gemma3.attention.sliding_window_pattern", int, 6),
    }


def _gemma(file: GGUF, fields: dict[str, Any], layers_of_27b: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share. No key tells the scale of attention; llama.cpp knows the one model that differs."""
    head = _head_dim(file, fields)
    largest = fields["num_hidden_layers"] == layers_of_27b
    scalar = fields["hidden_size"] // fields["num_attention_heads"] if largest else head["head_dim"]
    activation = "gelu_pytorch_tanh"
    return head | {"query_pre_attn_scalar": scalar, "hidden_act": activation, "hidden_activation": activation}


def _phi3(file: GGUF, fields: dict[str, Any]) -> dict[str, Any]:
    head = fields["hidden_size"] // fields["num_attention_heads"]
    rotated = file.get("phi3.rope.dimension_count", int, head)
    original = file.get("phi3.rope.scaling.original_context_length", int, fields["max_position_embeddings"])
    return {
        "partial_rotary_factor": _fraction(rotated, head),
        "original_max_position_embeddings": original,
        "attention_bias": False,
    }


def _fraction(part: int, whole: int) -> float:
    """part / whole such that int(whole * fraction) is part again, which is what models compute."""
    fraction = part / whole
    return fraction if int(whole * fraction) == part else math.nextafter(fraction, 2.0)


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", _llama, permuted=True),  # Mistral's models, too
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _qwen2),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _qwen3),
    "gemma": Architecture("gemma", "GemmaForCausalLM", _gemma1, shifted_norms=True),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _gemma2, shifted_norms=True),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", _gemma3, shifted_norms=True),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", _phi3),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", _smollm3, permuted=True),
}
MIXTURES = {
    "llama": Architecture("mixtral", "MixtralForCausalLM", _mixtral, permuted=True),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe),
}
