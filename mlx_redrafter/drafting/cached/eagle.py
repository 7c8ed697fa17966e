"""An EAGLE-3 head (arXiv 2503.01840): one transformer layer over hidden states of three of the target's layers.

Row j reads a context, the hidden states of token j as the layers return them, and the embedding of token j + 1.
Behind the last token that the target has read, a row's own output takes the place of the context. Knows nothing
of how its rows get into its cache.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.llama import MLP, Attention, ModelArgs

from mlx_redrafter.drafting.cached.head import ContextReader
from mlx_redrafter.drafting.drafter_files import (
    HeadConfig,
    ScoringDrafter,
    read_draft_vocab_size,
    true_or_false,
    whole_number,
)
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.cache.kv_cache import KVCache
from mlx_redrafter.target.layers import RawLayers
from mlx_redrafter.target.model import Target

MODEL_TYPE = "eagle3"
TAPS = 3


@dataclasses.dataclass
class EagleConfig(HeadConfig):
    """Shape of a head; `config.json` has these keys.

    Args:
        vocab_size, hidden_size: of the target.
        layer: mlx-lm's arguments of a Llama layer, its own hidden_size among them.
        draft_vocab_size: tokens that can be drafted, where not all; the tensor vocab_map
            then holds the target's id of each.
        context_layers: the target's layers, by the number of layers passed; where the head does not say it,
            those of the paper's code: 2, half of them, and all but 3.
        own_embedding: the head has one; else the target's is read.
        output_norm: the layer's output is normalised before the output layer.
        norm_before_residual: the residual stream begins behind the context's norm.
        unit_contexts: hidden states come at unit RMS, the last one behind the final norm, as recurrent heads read
            them; else as the layers return them.
        tie_output: the output layer is the target's own, or those of its rows that can be drafted; not stored.
    """

    vocab_size: int
    hidden_size: int
    layer: dict[str, Any]
    draft_vocab_size: int | None = None
    context_layers: tuple[int, ...] = ()
    own_embedding: bool = False
    output_norm: bool = True
    norm_before_residual: bool = False
    unit_contexts: bool = False
    tie_output: bool = False
    model_type = MODEL_TYPE
    said = ("output_norm",)

    @classmethod
    def from_dict(cls, fields: dict[str, Any], source: str) -> EagleConfig:
        """Reads and checks the keys of a config.json; unknown ones are ignored.

        Raises:
            UserError: a missing key, or a value of the wrong type or range, and where it is: in `source`.
        """
        values: dict[str, Any] = {key: whole_number(fields, key, 1, source) for key in ("vocab_size", "hidden_size")}
        layer = fields.get("layer")
        if not isinstance(layer, dict):
            raise UserError(f"{source}: layer is {layer!r}, expected an object")
        for key in ("hidden_size", "intermediate_size", "num_attention_heads"):
            whole_number(layer, key, 1, f"{source}: layer")
        if not isinstance(layer.get("rms_norm_eps"), float):
            raise UserError(f"{source}: layer: rms_norm_eps is {layer.get('rms_norm_eps')!r}, expected a number")
        for key in ("own_embedding", "output_norm", "norm_before_residual", "unit_contexts", "tie_output"):
            values[key] = true_or_false(fields, key, key == "output_norm", source)
        values["draft_vocab_size"] = read_draft_vocab_size(fields, values["vocab_size"], source)
        layers = fields.get("context_layers") or []
        if not isinstance(layers, list) or (
            layers and not (len(layers) == TAPS and all(type(n) is int and n > 0 for n in layers))
        ):
            raise UserError(f"{source}: context_layers is {layers!r}, expected {TAPS} numbers from 1 on")
        shared = "embedding" if not values["own_embedding"] else "output layer" if values["tie_output"] else None
        if shared and layer["hidden_size"] != values["hidden_size"]:
            raise UserError(
                f"{source}: the head is {layer['hidden_size']} wide, the target's {shared} {values['hidden_size']}"
            )
        return cls(**values, layer=layer, context_layers=tuple(layers)).with_notes(fields, source)

    def args(self) -> ModelArgs:
        """The layer's arguments, as mlx-lm has them."""
        usual = {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": self.vocab_size}
        return ModelArgs.from_dict(usual | self.layer)

    def widths(self) -> dict[str, int]:
        args = self.args()
        attended = args.num_attention_heads * (args.head_dim or args.hidden_size // args.num_attention_heads)
        return {
            "hidden_size": self.hidden_size,
            "layer.hidden_size": args.hidden_size,
            "layer.intermediate_size": args.intermediate_size,
            "heads' width": attended,
        }


class EagleLayer(nn.Module):
    """A Llama layer whose attention reads an embedding and a context side by side."""

    def __init__(self, args: ModelArgs, norm_before_residual: bool):
        super().__init__()
        self.norm_before_residual, size = norm_before_residual, args.hidden_size
        self.self_attn = Attention(args)
        for name in ("q_proj", "k_proj", "v_proj"):
            narrow = getattr(self.self_attn, name)
            setattr(self.self_attn, name, nn.Linear(2 * size, narrow.weight.shape[0], bias=args.attention_bias))
        self.mlp = MLP(args)
        self.hidden_norm, self.input_layernorm, self.post_attention_layernorm = (
            nn.RMSNorm(size, eps=args.rms_norm_eps) for _ in range(3)
        )

    def __call__(self, embedding: mx.array, context: mx.array, mask: Any, cache: Any) -> mx.array:
        """(B, M, width) from both, each of that shape."""
        normed = self.hidden_norm(context)
        both = mx.concatenate([self.input_layernorm(embedding), normed], axis=-1)
        hidden = (normed if self.norm_before_residual else context) + self.self_attn(both, mask, cache)
        result: mx.array = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return result


class EagleHead(ScoringDrafter, ContextReader):
    """The head's weights, and what its memory asks of it (see `cached.memory.Reader`)."""

    method = "eagle3"
    unread = ("vocab_map", "fc.", "embed_tokens.")  # `fc` is read once per step, of an embedding a few rows

    def __init__(self, config: EagleConfig):
        super().__init__()
        self.config = config
        args = config.args()
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, args.hidden_size)
        self.fc = nn.Linear(TAPS * config.hidden_size, args.hidden_size, bias=False)
        self.layer = EagleLayer(args, config.norm_before_residual)
        if config.output_norm:
            self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.add_output_layer(args.hidden_size)
        self._layers = self._numbers(config.context_layers)

    @property
    def context_layers(self) -> tuple[int, ...]:  # type: ignore[override]
        return self._layers

    def fit(self, target: Target) -> None:
        """Also takes from the target which layers are read, where the head does not say it."""
        self.take("embed", self.embed_tokens if self.config.own_embedding else target.embed)
        if not self.config.context_layers:
            count = target.num_layers
            self._layers = self._numbers((2, count // 2, count - 3))

    def _numbers(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        return layers if self.config.unit_contexts else RawLayers(layers)

    def rows(self, tokens: mx.array, contexts: mx.array | None, cache: KVCache) -> mx.array:
        assert contexts is not None
        if contexts.shape[-1] == TAPS * self.config.hidden_size:
            contexts = self.fc(contexts)
        [layer] = cache.layers
        mask = layer.make_mask(tokens.shape[1])
        rows: mx.array = self.layer(self.embed(tokens).astype(contexts.dtype), contexts, mask, layer)
        return rows

    def scores(self, hidden: mx.array) -> mx.array:
        scores: mx.array = self.lm_head(self.features(hidden))
        return scores

    def features(self, hidden: mx.array) -> mx.array:
        """What the output layer reads of rows' outputs."""
        return self.norm(hidden) if self.config.output_norm else hidden
