"""Makes a small random instance of any mlx-lm model module that decodes text, and drafters for it.

Knows nothing of what is checked with them. Most configs say the same things under the same names: a field that a
module asks for gets the value that `small_configs.json` has in common for all; fields of `only_if_required` do only
where they have no default, for other defaults are those of a large model. `special` has what only one module asks for,
or wants otherwise, on top of the `parts` that it is made of. Vocabularies have 99 tokens, windows 16.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import pkgutil
import sys
import types
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache

from mlx_redrafter.drafting.redrafter import DrafterConfig, RecurrentDrafter
from mlx_redrafter.target.model import Target

CONFIGS = json.loads(importlib.resources.files(__package__).joinpath("small_configs.json").read_text("utf-8"))


def modules() -> list[str]:
    """The names of mlx-lm's modules that define a `Model`."""
    names = sorted(module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__))
    return [name for name in names if hasattr(_import(name), "Model")]


def _import(name: str) -> types.ModuleType:
    # olmo asks whether ai2-olmo is installed and uses nothing of it.
    sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    return importlib.import_module(f"mlx_lm.models.{name}")


def config(name: str) -> dict[str, Any]:
    """A config for a small instance of a module."""
    common, found = CONFIGS["common"], {"model_type": name}
    for field in dataclasses.fields(_import(name).ModelArgs):
        required = field.default is field.default_factory is dataclasses.MISSING
        if field.name in common and (required or field.name not in CONFIGS["only_if_required"]):
            found[field.name] = common[field.name]
    return found | _whole(CONFIGS["special"].get(name, {}))


def _whole(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields together with those of the parts that they are `of`."""
    found: dict[str, Any] = {}
    for name in fields.get("of", ()):
        found |= CONFIGS["parts"][name]
    return found | {n: _whole(v) if isinstance(v, dict) else v for n, v in fields.items() if n != "of"}


def build(name: str) -> nn.Module:
    """A random float32 instance of a module; its weights are such that choices depend on what was read."""
    module = _import(name)
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config(name)))
    model.set_dtype(mx.float32)
    model.update(tree_map_with_path(_lively, model.parameters()))
    mx.eval(model.parameters())
    return model


def _lively(path: str, weight: mx.array) -> mx.array:
    """Weights that a module begins with as 0 or 1 get some noise; matrices are doubled."""
    if not mx.issubdtype(weight.dtype, mx.floating):
        return weight
    noise = 0.1 * mx.random.normal(weight.shape)
    return (2 * weight if weight.ndim == 2 and "norm" not in path else weight) + noise


def random_drafter(target: Target, **shape: Any) -> RecurrentDrafter:
    """A drafter that knows nothing; `shape` is what else its config says."""
    mx.random.seed(1)
    vocab, size = target.vocab_size, target.hidden_size
    drafter = RecurrentDrafter(DrafterConfig(vocab, size, size, num_draft_layers=1, **shape))
    mx.eval(drafter.parameters())
    return drafter


class PerfectDrafter(RecurrentDrafter):
    """A drafter that knows the continuation: it finds its place in it by the context it is given.

    Args:
        target: the model.
        prompt: token ids.
        continuation: what the model writes after them.
        context_layers: of its contexts.
    """

    def __init__(
        self, target: Target, prompt: list[int], continuation: list[int], context_layers: tuple[int, ...] = ()
    ):
        vocab, size = target.vocab_size, target.hidden_size
        super().__init__(DrafterConfig(vocab, size, size, num_draft_layers=0, context_layers=context_layers))
        cache = make_prompt_cache(target.model)
        contexts, read = [], [prompt, *([token] for token in continuation[:-1])]
        for tokens in read:
            hidden, _ = target.forward(mx.array([tokens]), cache, context_layers=context_layers)
            assert hidden is not None
            contexts.append(hidden[0, -1].astype(mx.float32))
            mx.eval(contexts[-1])
        self._contexts = mx.stack(contexts)  # [i]: of the step whose root is continuation[i]
        self._continuation = mx.array(continuation)

    def project_context(self, context: mx.array) -> mx.array:
        return context

    def advance(self, embedding: mx.array, state: mx.array | None) -> mx.array:
        """Counts the tokens read."""
        return mx.ones(embedding.shape) if state is None else state + 1

    def logits(self, projected_context: mx.array, state: mx.array) -> mx.array:
        gaps = mx.square(self._contexts - projected_context.astype(mx.float32)[..., None, :]).sum(axis=-1)
        place = mx.argmin(gaps, axis=-1) + state[..., 0].astype(mx.int32)
        token = self._continuation[mx.minimum(place, self._continuation.size - 1)]
        return 10.0 * (mx.arange(self.config.vocab_size) == token[..., None]).astype(mx.float32)
