"""A model's own multi-token-prediction layer (arXiv 2412.19437, section 2.2) as its drafter.

    x = F [norm_e(e(token j + 1)) ; norm_h(h_j)],   output = norm(layer(x)),   scores = O output

h is the target's last hidden state, after its final norm, or a row's own output in its place; e and O are the target's
embedding and output layer. The layer is one of mlx-lm's model of the same type. Knows nothing of the names that
checkpoints give to all this (see `mtp_weights`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes

from mlx_redrafter.drafting.cached.head import ContextReader
from mlx_redrafter.drafting.drafter_files import HeadConfig, whole_number
from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.system.weights import tensors
from mlx_redrafter.target.cache.kv_cache import KVCache
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.output_layer import output_layer

MODEL_TYPE = "mtp"
# What makes the only layer of a model one of those that attend to all before, with experts where the model has any.
_ONE_LAYER = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "full_attention_interval": 1, "mlp_only_layers": []}


@dataclasses.dataclass
class MtpConfig(HeadConfig):
    """Shape of a layer; `config.json` has these keys.

    Args:
        vocab_size, hidden_size: of the target.
        model: the target's own config, from which mlx-lm makes its layers.
    """

    vocab_size: int
    hidden_size: int
    model: dict[str, Any]
    model_type = MODEL_TYPE
    tie_output: ClassVar[bool] = True

    @classmethod
    def from_dict(cls, fields: dict[str, Any], source: str) -> MtpConfig:
        """Reads and checks the keys of a config.json; unknown ones are ignored.

        Raises:
            UserError: a missing key, a value of the wrong type or range, or a model that mlx-lm does not have.
        """
        vocab, hidden = (whole_number(fields, key, 1, source) for key in ("vocab_size", "hidden_size"))
        model = fields.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("model_type"), str):
            raise UserError(f"{source}: model is {model!r}, expected the config of a model")
        config = cls(vocab, hidden, model)
        try:
            _ = config.family
        except Exception as error:  # whatever mlx-lm makes of the config
            raise UserError(f"{source}: mlx-lm cannot make a layer of such a model: {one_line(error)}") from error
        return config.with_notes(fields, source)

    @functools.cached_property
    def family(self) -> nn.Module:
        """mlx-lm's model of one layer, the head's; of random weights that nobody has computed until it has its own."""
        model_class, args = _get_classes(self.model)
        family: nn.Module = model_class(args.from_dict(copy.deepcopy(self.model | _ONE_LAYER)))
        return family

    def widths(self) -> dict[str, int]:
        layer = self.family.layers[0]
        found = {name: m.weight.shape[-1] for name, m in layer.named_modules() if hasattr(m, "to_quantized")}
        return {"hidden_size": self.hidden_size} | found


def body_of(family: nn.Module) -> str:
    """The path of the module that has a model's embedding, layers and final norm."""
    return next(path for path, module in family.named_modules() if {"embed_tokens", "layers", "norm"} <= module.keys())


class MtpHead(ContextReader):
    """The layer with what stands before and behind it."""

    method = "mtp"

    def __init__(self, config: MtpConfig):
        super().__init__()
        self.config = config
        # The model around the layer says which caches it has, and which weights no type may change.
        family = config.family
        # Its own code makes the masks and calls the layer: it is called with what `fc` gives in place of embeddings.
        self.body: Any = dict(family.named_modules())[body_of(family)]
        self.body.embed_tokens = nn.Identity()
        size, eps = config.hidden_size, self.body.norm.eps
        self.embedding_norm, self.context_norm = nn.RMSNorm(size, eps=eps), nn.RMSNorm(size, eps=eps)
        self.fc = nn.Linear(2 * size, size, bias=False)

    def fit(self, target: Target) -> None:
        """Shares the target's embedding and output layer."""
        self.take("embed", target.embed)
        if not hasattr(self, "lm_head"):
            self.take("lm_head", output_layer(target))

    def set_dtype(self, dtype: mx.Dtype, *given: Any) -> None:
        """As nn.Module's, but for weights that mlx-lm keeps in full, as a router's bias."""
        may_cast = getattr(self.config.family, "cast_predicate", lambda name: True)
        kept = {name: value for name, value in tensors(self).items() if not may_cast(name)}
        super().set_dtype(dtype, *given)
        self.update(tree_unflatten(list(kept.items())))

    def is_quantizable(self, path: str, module: nn.Module) -> bool:
        """Routers stay whole, which mlx-lm gives more bits than it gives experts."""
        wanted = getattr(self.config.family, "quant_predicate", None)
        return super().is_quantizable(path, module) and (wanted is None or wanted(path, module) is True)

    def make_cache(self) -> KVCache:
        return KVCache(make_prompt_cache(self.config.family))

    def rows(self, tokens: mx.array, contexts: mx.array | None, cache: KVCache) -> mx.array:
        assert contexts is not None
        embedding = self.embedding_norm(self.embed(tokens).astype(contexts.dtype))
        both = mx.concatenate([embedding, self.context_norm(contexts)], axis=-1)
        rows: mx.array = self.body(self.fc(both), cache.layers)
        return rows

    def scores(self, hidden: mx.array) -> mx.array:
        scores: mx.array = self.lm_head(hidden)
        return scores
