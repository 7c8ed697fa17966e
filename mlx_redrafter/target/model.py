"""Calls an mlx-lm model and returns hidden states beside its logits; gives its embedding.

Knows nothing of drafts. The model is unmodified and its own code computes everything. A few
things are replaced while it is called, and put back afterwards:

- the module that yields the hidden state its head reads, by a recorder;
- layers whose hidden states are asked for, by taps;
- MLX's rope, which takes one position per batch entry, by one that also takes one per row,
  and what MLX computes slowly on a CPU (see `operations`).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import weakref
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.module_slots import Slot, StandIn, slots, standing_in
from mlx_redrafter.system.ranks import LAUNCHED_TOGETHER
from mlx_redrafter.system.weights import tensors
from mlx_redrafter.target.layers import RawLayers, Tap, find_layers
from mlx_redrafter.target.operations import positions_per_row, speed_up
from mlx_redrafter.target.splitting import is_pipelined, ranks_of

_SHARE, _FEWEST = 0.025, 32  # of the weights' bytes; rows
_NUMBERS = 40  # hidden states that are there at once for each row, about, as wide as the numbers of one or two layers


class Target:
    """An mlx-lm model with the two seams that verification needs.

    Args:
        model: an mlx-lm language model; the same after every call as before.

    Attributes:
        embed: the token embedding; gives (..., hidden_size) for ids of any shape.
        vocab_size, hidden_size: of the embedding.
        missing: why there are no hidden states to draft from, for people; empty where
            there are. Plain decoding works all the same.
        context_length: the longest sequence the model's config says it can read, in tokens;
            None if it does not say.
        ranks: the processes that the model is split over, of which rank 0 decides; None where this one has all of it.
    """

    @classmethod
    def of(cls, model: nn.Module) -> Target:
        """The one target of a model, made anew only where the last one is no longer in use or no longer fits."""
        # A weak reference: the model would own itself in a circle otherwise, and its memory would stay.
        known = getattr(model, "_redrafter_target", None)
        target = None if known is None else known()
        fits = (
            target is not None
            and target.model is model
            and (not LAUNCHED_TOGETHER or target.ranks is ranks_of(model))
            and all(s.owner[s.name] is s.module for s, _ in target._stand_ins)
        )
        if target is None or not fits:
            target = cls(model)
            model._redrafter_target = weakref.ref(target)
        return target

    def __init__(self, model: nn.Module):
        self.model, self.ranks = model, ranks_of(model) if LAUNCHED_TOGETHER else None
        speed_up(model)
        self.missing = ""
        self.vocab_size = self.hidden_size = 0
        self.context_length = _setting(model, "max_position_embeddings")
        self._stand_ins: list[tuple[Slot, _Recorder]] = []
        if (parts := _find_body(model, (_setting(model, "vocab_size"), _setting(model, "hidden_size")))) is None:
            self.missing = f"model type {getattr(model, 'model_type', '?')!r} has no stack of layers with an embedding"
            return
        body, embedding = parts
        self.embed: Any = embedding.module
        self.vocab_size, self.hidden_size = _embedding_shape(self.embed)
        # What hangs inside the body goes in last and comes out first.
        self._stand_ins = [(body, _Recorder(body.module)), (embedding, _TiedHead(embedding.module))]
        for name, child in body.module.children().items():  # a body with the head inside returns logits
            if isinstance(child, (nn.Linear, nn.QuantizedLinear)) and child.weight.shape[0] == self.vocab_size:
                self._stand_ins.append((Slot(name, body.module, name, child), _Head(child)))

    @property
    def dtype(self) -> mx.Dtype:
        """The type of the embeddings, which is that of the model's activations."""
        return self.embed(mx.zeros((1, 1), mx.int32)).dtype

    @functools.cached_property
    def rows_at_once(self) -> int:
        """Rows whose numbers take a small share of the memory that the weights do while the model reads them."""
        weights = sum(array.nbytes for array in tensors(self.model).values())
        return max(_FEWEST, int(_SHARE * weights / (_NUMBERS * max(1, self.hidden_size) * self.dtype.size)))

    @property
    def num_layers(self) -> int:
        """Layers whose hidden states can be read; 0 where they were not found."""
        return len(self._layers[0])

    @functools.cached_property
    def _layers(self) -> tuple[list[Slot], str]:
        return find_layers(self.model, self.hidden_size)

    def check_layers(self, context_layers: tuple[int, ...], source: str) -> None:
        """Raises UserError unless `forward` can give contexts of these layers."""
        if not context_layers:
            return
        if LAUNCHED_TOGETHER and is_pipelined(self.model):
            raise UserError(f"{source}: hidden states between layers are not in all processes of a pipeline")
        found, why = self._layers
        if why:
            raise UserError(f"{source}: hidden states between this target's layers cannot be read: {why}")
        if min(context_layers) < 1:
            raise UserError(
                f"{source}: layer {min(context_layers)} is to be read; the target's {len(found)} are too few"
            )
        if (highest := max(context_layers)) > len(found):
            raise UserError(f"{source}: layer {highest} is to be read, but the target has {len(found)} layers")

    def context_size(self, context_layers: tuple[int, ...]) -> int:
        """The width of a context of these layers."""
        return max(1, len(context_layers)) * self.hidden_size

    def forward(
        self, tokens: mx.array, cache: list[Any], context_layers: tuple[int, ...] = ()
    ) -> tuple[mx.array | None, mx.array]:
        """One call of the model on M rows.

        Positions and mask are the cache's: mlx-lm's own caches make it the usual causal
        pass, `KVCache.layers` during a verification a tree. A cache whose `offset` is an
        array of shape (B, M) gives every row the position it says.

        Args:
            tokens: (B, M) ids.
            cache: one cache per layer.
            context_layers: which hidden states to give, by the number of layers passed, as
                `check_layers` allows them; none for the last alone.

        Returns:
            hidden (B, M, context_size), and logits (B, M, vocab_size). The last hidden state is
            what the model's head reads, after its final norm (None where `missing` says why);
            those between layers have unit RMS (see `RawLayers`), and all lie side by side in the order asked for.
        """
        raw = isinstance(context_layers, RawLayers)
        taps = {n: self._tap(n, raw) for n in context_layers if raw or n != self.num_layers}
        with standing_in([*self._stand_ins, *taps.values()]), positions_per_row():
            logits = self.model(tokens, cache=cache)
        hidden = None
        for _, recorder in reversed(self._stand_ins):  # the first that has seen a hidden state counts
            if recorder.seen is not None and recorder.seen.shape[-1] == self.hidden_size:
                hidden = recorder.seen
            recorder.seen = None
        if hidden is not None and context_layers:
            parts = [taps[n][1].hidden.astype(hidden.dtype) if n in taps else hidden for n in context_layers]
            hidden = mx.concatenate(parts, axis=-1)
        return hidden, logits

    def _tap(self, number: int, raw: bool) -> tuple[Slot, Any]:
        slot = self._layers[0][number - 1]
        now: Any = slot.owner[slot.name]  # another stand-in, where a layer is the mixer of its state itself
        tap = Tap(now)
        tap.raw = raw
        return dataclasses.replace(slot, module=now), tap


class _Recorder(StandIn):
    """Stands in for a body and keeps what it returned."""

    seen: mx.array | None = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        output = self.module(*args, **kwargs)
        self.seen = output[0] if isinstance(output, (tuple, list)) else output
        return output


class _Head(_Recorder):
    """Stands in for an output layer and keeps what it reads."""

    def call(self, x: mx.array) -> mx.array:
        self.seen = x
        return self.module(x)


class _TiedHead(_Recorder):
    """Stands in for an embedding and keeps what it reads as an output layer."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def as_linear(self, x: mx.array) -> mx.array:
        if self.at_work:
            self.seen = x
        return self.module.as_linear(x)  # type: ignore[operator]


def _find_body(model: nn.Module, shape: tuple[int | None, int | None]) -> tuple[Slot, Slot] | None:
    """Where the module hangs that has the layers and is called for the hidden state, and its token embedding."""
    for slot in slots(model):
        children = list(slot.module.children().values())
        direct = any(_is_stack(child) for child in children)
        embedding = _find_embedding(slot.module, shape)
        if embedding is None or not (direct or any(child is embedding.module for child in children)):
            continue
        if direct or any(_is_stack(c) for child in children if isinstance(child, nn.Module) for c in child.values()):
            return slot, embedding
    return None


def _is_stack(child: Any) -> bool:
    """Whether this is a list of layers, each of several modules."""
    return isinstance(child, list) and any(isinstance(m, nn.Module) and len(m.children()) > 1 for m in child)


def _find_embedding(body: nn.Module, shape: tuple[int | None, int | None]) -> Slot | None:
    """Where the token embedding of a body hangs, outside its layers: the one of this (vocabulary, width), if any."""
    found = []
    for slot in slots(body):
        if isinstance(slot.module, _EMBEDDINGS) and not any(part.isdigit() for part in slot.path.split(".")):
            rows, width = _embedding_shape(slot.module)
            found.append(((rows == shape[0]) + (width == shape[1]), rows, slot))
    return max(found, key=operator.itemgetter(0, 1), default=(0, 0, None))[2]


def _embedding_shape(module: Any) -> tuple[int, int]:
    """(vocabulary, width) of an embedding, quantised or not."""
    rows = module.weight.shape[0]
    return rows, (module.scales.shape[1] * module.group_size if "scales" in module else module.weight.shape[1])


def _setting(model: nn.Module, name: str) -> int | None:
    """A whole number from a model's config, wherever the config of its language model is."""
    args = getattr(model, "args", None)
    for owner in (args, getattr(args, "text_config", None)):
        value = owner.get(name) if isinstance(owner, dict) else getattr(owner, name, None)
        if isinstance(value, int):
            return value
    return None


_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
