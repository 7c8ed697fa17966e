"""A multi-token-prediction layer (arXiv 2412.19437, section 2.2) around transformers' own layers, without a cache.

Checkpoints are written under the names that the families publish, experts one by one.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from .eagle import beams_of

# transformers' module and the beginning of its classes' names; names of what a checkpoint has beside the layer: in
# front of all, the layer's, the projection, the norms of embeddings, hidden states and outputs.
FAMILIES = {
    "mimo": ("qwen2", "Qwen2", "model.mtp_layers.0.", "", "input_proj", "token_layernorm", "hidden_layernorm",
        "final_layernorm"),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3", "model.layers.4.", "", "eh_proj", "enorm", "hnorm",
        "shared_head.norm"),
    "glm4_moe": ("glm4_moe", "Glm4Moe", "model.layers.4.", "", "eh_proj", "enorm", "hnorm", "shared_head.norm"),
    "glm4_moe_lite": ("glm4_moe_lite", "Glm4MoeLite", "model.layers.4.", "", "eh_proj", "enorm", "hnorm",
        "shared_head.norm"),
    "qwen3_next": ("qwen3_next", "Qwen3Next", "mtp.", "layers.0.", "fc", "pre_fc_norm_embedding",
        "pre_fc_norm_hidden", "norm"),
    "qwen3_5": ("qwen3_5", "Qwen3_5", "mtp.", "layers.0.", "fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden",
        "norm"),
    "qwen3_5_moe": ("qwen3_5_moe", "Qwen3_5Moe", "mtp.", "layers.0.", "fc", "pre_fc_norm_embedding",
        "pre_fc_norm_hidden", "norm"),
}  # fmt: skip
# What stands in front of a second layer's names.
SECOND = {"model.mtp_layers.0.": "model.mtp_layers.1.", "model.layers.4.": "model.layers.5.", "mtp.": "mtp.layers.1."}


class Mtp(nn.Module):
    """The layer of a family, of random weights.

    Args:
        family: a key of FAMILIES.
        fields: the model's config.
        embedding, head: (vocab_size, hidden_size) each, of the target.
    """

    def __init__(self, family: str, fields: dict[str, Any], embedding: torch.Tensor, head: torch.Tensor):
        super().__init__()
        self.family, self.embedding, self.head = family, embedding, head
        name, start = FAMILIES[family][:2]
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        text = "Text" if family.startswith("qwen3_5") else ""
        fields = {key: value for key, value in fields.items() if key != "model_type"}
        rope = fields.pop("rope_parameters", {}) | {"rope_theta": fields["rope_theta"], "rope_type": "default"}
        if share := fields.get("partial_rotary_factor"):
            rope["partial_rotary_factor"] = share
        layers: dict[str, Any] = {"layer_types": ["full_attention"]} if family.startswith("qwen3") else {}
        if "first_k_dense_replace" in fields:
            layers |= {"first_k_dense_replace": 0, "mlp_layer_types": ["sparse"]}
        if "kv_lora_rank" in fields:  # each head has keys of its own
            layers["num_key_value_heads"] = fields["num_attention_heads"]
        same = {"num_hidden_layers": 1, "rope_parameters": rope, "attn_implementation": "eager"}
        self.config = getattr(module, f"{start}{text}Config")(**fields | layers | same)
        norm = getattr(module, f"{start}RMSNorm")
        size, eps = self.config.hidden_size, self.config.rms_norm_eps
        self.embedding_norm, self.hidden_norm, self.norm = (norm(size, eps=eps) for _ in range(3))
        self.projection = nn.Linear(2 * size, size, bias=False)
        self.layer = getattr(module, f"{start}DecoderLayer")(self.config, 0)
        self.rotary = getattr(module, f"{start}{text}RotaryEmbedding")(self.config)
        for weight in self.state_dict().values():  # norms begin as ones or zeros, experts as anything
            noise = torch.randn_like(weight)
            weight.copy_(noise / weight.shape[-1] ** 0.5 if weight.ndim > 1 else weight + 0.1 * noise)

    def checkpoint(self, stacked: bool = False) -> dict[str, torch.Tensor]:
        """Its tensors as they are published, with copies of what the target has, too, and part of a second layer.

        Args:
            stacked: all experts in one tensor, as Qwen3.5 has those of its other layers.
        """
        prefix, inner, *names = FAMILIES[self.family][2:]
        found = {f"{prefix}{names[0]}.weight": self.projection.weight}
        for name, norm in zip(names[1:], (self.embedding_norm, self.hidden_norm, self.norm)):
            found[f"{prefix}{name}.weight"] = norm.weight
        for name, weight in self.layer.state_dict().items():
            if stacked or not name.startswith("mlp.experts."):
                found[f"{prefix}{inner}{name}"] = weight
                continue
            for i, expert in enumerate(weight):
                parts = {"down_proj": expert} if "down" in name else zip(("gate_proj", "up_proj"), expert.chunk(2))
                found |= {f"{prefix}{inner}mlp.experts.{i}.{part}.weight": w for part, w in dict(parts).items()}
        found[f"{SECOND[prefix]}input_layernorm.weight"] = torch.zeros(3)
        if inner == "" and self.family != "mimo":
            found |= {f"{prefix}embed_tokens.weight": self.embedding, f"{prefix}shared_head.head.weight": self.head}
        return found

    def outputs(self, contexts: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        """Every row's output (n, size); rows beyond the contexts (m, size) read the output of the row before."""
        while True:
            rows = len(contexts)
            embedded, read = self.embedding_norm(self.embedding[tokens[:rows]]), self.hidden_norm(contexts)
            both = [read, embedded] if self.family == "mimo" else [embedded, read]
            hidden = self.projection(torch.cat(both, dim=-1))[None]
            mask = torch.full((rows, rows), float("-inf")).triu(1)[None, None]
            turns = self.rotary(hidden, torch.arange(rows)[None])
            hidden = self.norm(self.layer(hidden, position_embeddings=turns, attention_mask=mask))[0]
            if rows == len(tokens):
                return hidden
            contexts = torch.cat([contexts, hidden[-1:]])

    @torch.no_grad()
    def logits(self, contexts: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        """(vocab_size,) scores behind the last row."""
        return self.head @ self.outputs(contexts, tokens)[-1]

    def beams(self, contexts: torch.Tensor, tokens: list[int], width: int, length: int) -> list[list[tuple[int, ...]]]:
        """As those of an EAGLE-3 head."""
        return beams_of(lambda path: self.logits(contexts, [*tokens, *path]), None, width, length)
