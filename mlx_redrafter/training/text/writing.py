"""Lets the target write: continues many prompts at a time, sampled at a temperature per row.

Knows nothing of where prompts come from, nor of what is kept of a text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache

from mlx_redrafter.target.operations import positions_per_row
from mlx_redrafter.training.text.data_plan import DataPlan
from mlx_redrafter.training.text.rendering import Renderer
from mlx_redrafter.training.text.shards import Make, Progress, Recipe
from mlx_redrafter.tuning import store

LOOK_EVERY = 16  # tokens between looks at which rows have ended; each look waits for the device
PREFILL_TOKENS = 8192  # tokens of prompts read per call


@dataclasses.dataclass
class Writer:
    """A target that writes rows as a plan says."""

    model: nn.Module
    renderer: Renderer
    plan: DataPlan

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        temperatures: Sequence[float],
        seed: Sequence[int],
        progress: Progress,
        warm_up: int = 0,
    ) -> list[list[int]]:
        """Continues prompts to rows: see `write`."""
        length, ends, at_once = self.plan.length, self.renderer.ends, self.plan.batch_size
        return write(self.model, prompts, length, temperatures, ends, seed, at_once, warm_up, progress)

    def recipe(self, make: Make, shards: int | None = None, limit: int | None = None, **settings: Any) -> Recipe:
        """The recipe of rows that the target writes.

        They depend on its weights, but not on the batch size: that may change where memory was short.
        """
        plan, own = self.plan, {"model": weights_digest(self.model), "temps": list(self.plan.temps)}
        settings = plan.settings(**own, tokenizer=self.renderer.fingerprint(), **settings)
        shards = plan.shards if shards is None else shards
        return Recipe(settings, plan.length, shards, make, plan.held_out > 0, limit)


def write(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    length: int,
    temperatures: Sequence[float],
    ends: Collection[int],
    seed: Sequence[int],
    batch_size: int = 64,
    warm_up: int = 0,
    progress: Progress = lambda tokens: None,
) -> list[list[int]]:
    """Continues prompts with the model's own choices.

    Rows are read together, shorter prompts padded on the left. Rows that have ended leave
    the batch, so that it gets faster towards its end.

    Args:
        prompts: R lists of at least one token id.
        length: tokens of prompt and continuation together, at most.
        temperatures: R numbers; 0 is greedy.
        ends: token ids that end a row.
        seed: numbers that the noise depends on (and on the batch's number, batch_size and R alone).
        warm_up: the first so many tokens are sampled at temperature 1 at least, for variety
            where the prompts have none.

    Returns:
        R continuations, the prompt not included, the ending token included where there is one.
    """
    lengths = [len(prompt) for prompt in prompts]
    batches: list[list[int]] = []
    paddable = all(type(c) is KVCache for c in make_prompt_cache(model))
    for row in sorted(range(len(prompts)), key=lambda row: lengths[row]):
        full = not batches or len(batches[-1]) == batch_size
        if full or (lengths[row] != lengths[batches[-1][0]] and not paddable):
            batches.append([])
        batches[-1].append(row)
    written: list[list[int]] = [[] for _ in prompts]
    for number, batch in enumerate(batches):
        key = mx.random.key(int(np.random.SeedSequence([*seed, number]).generate_state(1, np.uint64)[0]))
        rows = [prompts[row] for row in batch]
        at = np.array([temperatures[row] for row in batch], np.float32)
        for row, tokens in zip(batch, _batch(model, rows, length, at, ends, key, warm_up, progress), strict=True):
            written[row] = tokens
        mx.clear_cache()
    return written


def weights_digest(model: nn.Module) -> str:
    """A short name for the weights: changes with the names, shapes, types or first values of any of them."""
    tensors: list[tuple[str, mx.array]] = sorted(dict(tree_flatten(model.parameters())).items())
    samples = [tensor.reshape(-1)[:8].astype(mx.float32) for _, tensor in tensors]
    mx.eval(samples)
    facts = zip(tensors, samples, strict=True)
    return store.digest(b"".join(f"{n} {t.shape} {t.dtype}".encode() + np.array(x).tobytes() for (n, t), x in facts))


def _batch(
    model: nn.Module,
    prompts: list[Sequence[int]],
    length: int,
    temperatures: np.ndarray,
    ends: Collection[int],
    key: mx.array,
    warm_up: int,
    progress: Progress,
) -> list[list[int]]:
    longest = max(len(prompt) for prompt in prompts)
    padded = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, longest - len(prompt) :] = prompt
    room = [length - len(prompt) for prompt in prompts]
    cache = make_prompt_cache(model)
    if len(set(room)) > 1:  # a cache that knows of padding only where there is some, for its masks cost time
        cache = [BatchKVCache([longest - len(prompt) for prompt in prompts]) for _ in cache]
    block = max(1, PREFILL_TOKENS // len(prompts))
    for first in range(0, longest - 1, block):
        with positions_per_row():  # on a CPU that is faster
            model(mx.array(padded[:, first : longest - 1][:, :block]), cache=cache)  # its logits are never computed
        mx.eval([c.state for c in cache])
    token, column = mx.array(padded[:, -1:]), mx.array(temperatures)[:, None]
    written: list[list[int]] = [[] for _ in prompts]
    alive = np.arange(len(prompts))
    columns: list[mx.array] = []
    for step in range(max(room)):
        with positions_per_row():
            logits = model(token, cache=cache)[:, -1].astype(mx.float32)
        if temperatures[alive].any() or step < warm_up:
            key, use = mx.random.split(key)
            strength = mx.maximum(column, 1.0) if step < warm_up else column
            # The largest of logits + t * Gumbel noise is a sample at temperature t, and at 0 the greedy choice.
            logits = logits + strength * mx.random.gumbel(logits.shape, key=use)
        token = mx.argmax(logits, axis=-1, keepdims=True).astype(mx.int32)
        mx.async_eval(token)
        columns.append(token)
        progress(len(alive))
        if len(columns) < LOOK_EVERY and step + 1 < max(room):
            continue
        going = _take(np.array(mx.concatenate(columns, axis=1)), alive, written, room, ends)
        columns = []
        if not going.any():
            break
        if going.mean() <= 0.75 and _keep(cache, keep := mx.array(np.flatnonzero(going))):
            token, column, alive = token[keep], column[keep], alive[going]
    return written


def _take(
    block: np.ndarray, alive: np.ndarray, written: list[list[int]], room: list[int], ends: Collection[int]
) -> np.ndarray:
    """Appends a block of new tokens to its rows, up to their ends. Returns which of them go on."""
    going = np.zeros(len(alive), bool)
    for i, row in enumerate(alive):
        tokens = written[row]
        if tokens and tokens[-1] in ends:
            continue
        for token in block[i, : max(0, room[row] - len(tokens))].tolist():
            tokens.append(token)
            if token in ends:
                break
        going[i] = len(tokens) < room[row] and tokens[-1] not in ends
    return going


def _keep(cache: list[Any], rows: mx.array) -> bool:
    """Drops all other rows of a batch, in caches that can; says whether they could."""
    if not all(type(c) in (KVCache, BatchKVCache) for c in cache):
        return False
    for c in cache:
        if isinstance(c, BatchKVCache):
            c.filter(rows)
        else:
            c.keys, c.values = c.keys[rows], c.values[rows]
    return True
