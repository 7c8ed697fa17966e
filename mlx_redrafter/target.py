"""What decoding needs of a target model: hidden states, logits, embeddings.

The model is an unmodified mlx-lm model and its own code computes everything. Two things
are slipped in while it is called, and taken out again afterwards:

- the module that yields the hidden state its head reads is replaced by a recorder;
- each rope module is replaced by one that accepts a position per token. MLX's rope takes
  one offset per batch row, so the token axis is moved to the batch axis around it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class Target:
    """An mlx-lm model with the two seams that verification needs.

    Args:
        model: an mlx-lm language model; the same after every call as before.

    Attributes:
        vocab_size, hidden_size: of the token embedding.
        missing: why there are no hidden states to draft from, for people; empty where
            there are. Plain decoding works all the same.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.missing = ""
        self.vocab_size = self.hidden_size = 0
        self._stand_ins: list[tuple[nn.Module, str, Any]] = list(_find_ropes(model))
        self._recorder = None
        if (found := _find_body(model)) is None:
            self.missing = f"model type {getattr(model, 'model_type', '?')!r} has no stack of layers with an embedding"
            return
        owner, name = found
        self._embedding: Any = _find_embedding(getattr(owner, name))  # there is one, or it were no body
        self._recorder = _Recorder(getattr(owner, name))
        self._stand_ins.append((owner, name, self._recorder))
        self.vocab_size, self.hidden_size = _embedding_shape(self._embedding)

    @property
    def context_length(self) -> int | None:
        """The longest sequence the model's config says it can read, in tokens; None if it does not say."""
        args = getattr(self.model, "args", None)
        for owner in (args, getattr(args, "text_config", None)):
            value = owner.get("max_position_embeddings") if isinstance(owner, dict) else None
            value = value or getattr(owner, "max_position_embeddings", None)
            if isinstance(value, int):
                return value
        return None

    @property
    def dtype(self) -> mx.Dtype:
        """The type of the embeddings, which is that of the model's activations."""
        return self.embed(mx.zeros((1, 1), mx.int32)).dtype

    def embed(self, tokens: mx.array) -> mx.array:
        """e(x): the rows of the target's embedding, (..., hidden_size), for token ids of any shape."""
        return self._embedding(tokens)

    def forward(self, tokens: mx.array, cache: list[Any]) -> tuple[mx.array | None, mx.array]:
        """One call of the model on M rows.

        Positions and mask are the cache's: mlx-lm's own caches make it the usual causal
        pass, `KVCache.layers` during a verification a tree. A cache whose `offset` is an
        array of shape (B, M) gives every row the position it says.

        Args:
            tokens: (B, M) ids.
            cache: one cache per layer.

        Returns:
            hidden (B, M, hidden_size), what the head reads (None where `missing` says why),
            and logits (B, M, vocab_size).
        """
        with self._slipped_in():
            logits = self.model(tokens, cache=cache)
        return (self._recorder.take() if self._recorder else None), logits

    @contextlib.contextmanager
    def _slipped_in(self) -> Iterator[None]:
        """The stand-ins are in the model only while one call of it builds its graph."""
        for owner, name, stand_in in self._stand_ins:
            setattr(owner, name, stand_in)
        try:
            yield
        finally:
            for owner, name, stand_in in self._stand_ins:
                setattr(owner, name, stand_in.module)


class _Recorder:
    """Stands in for a module: calls it, keeps what it returned, passes everything else through."""

    def __init__(self, module: nn.Module):
        self.module = module
        self._output: mx.array | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._output = self.module(*args, **kwargs)
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def take(self) -> mx.array:
        output, self._output = self._output, None
        assert output is not None
        return output


class _PerTokenRope:
    """Stands in for a rope module and accepts offsets of shape (B, M), one per token."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, x: mx.array, *args: Any, offset: Any = 0, **kwargs: Any) -> mx.array:
        if not (isinstance(offset, mx.array) and offset.ndim == 2):
            return self.module(x, *args, offset=offset, **kwargs)
        batch, heads, rows, dims = x.shape
        moved = x.swapaxes(1, 2).reshape(batch * rows, heads, 1, dims)
        turned = self.module(moved, *args, offset=offset.reshape(-1), **kwargs)
        return turned.reshape(batch, rows, heads, dims).swapaxes(1, 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _find_body(model: nn.Module) -> tuple[nn.Module, str] | None:
    """The owner and attribute name of the module that holds the layers and is called for the hidden state."""
    for name, module in model.named_modules():
        if name and isinstance(module.get("layers"), list) and _find_embedding(module) is not None:
            *path, last = name.split(".")
            owner = model
            for part in path:
                owner = owner[int(part)] if isinstance(owner, list) else getattr(owner, part)
            return owner, last
    return None


def _find_embedding(body: nn.Module) -> nn.Module | None:
    """The token embedding among the direct children of a body."""
    found = [m for m in body.children().values() if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding))]
    return max(found, key=lambda module: _embedding_shape(module)[0], default=None)


def _embedding_shape(module: Any) -> tuple[int, int]:
    """(vocabulary, width) of an embedding, quantised or not."""
    rows = module.weight.shape[0]
    return rows, (module.scales.shape[1] * module.group_size if "scales" in module else module.weight.shape[1])


def _find_ropes(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Every module called some form of rope inside an attention, with the stand-in for it."""
    found = []
    for owner in model.modules():
        for name, child in owner.children().items():
            if "rope" in name.lower() and isinstance(child, nn.Module):
                found.append((owner, name, _PerTokenRope(child)))
    return found
