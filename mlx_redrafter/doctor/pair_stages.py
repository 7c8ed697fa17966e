"""Stages of a target and its drafter, from inputs that the reference has computed.

Knows nothing of how they are compared.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_redrafter.doctor.beam_stage import beam_stage
from mlx_redrafter.doctor.comparison import Place, Stage
from mlx_redrafter.drafting.cached.draft_model import DraftModel
from mlx_redrafter.drafting.cached.head import ContextReader
from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.drafting.redrafter import RecurrentDrafter
from mlx_redrafter.target.cache.kv_cache import KVCache
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import is_quantized, probe
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import CHAIN, TREE, Capability, Verifier

PARENTS = (0, 0, 0, 1, 2, 4)  # of the tree whose rows are verified
PATH = (2, 4)  # what is accepted of it, the root aside
CASES = 3  # places of the prompt that are drafted behind
ROWS_READ = 200  # rows that one place reads in all stages, about


class Inputs(NamedTuple):
    """What stages start from."""

    prompt: mx.array  # (1, P) token ids
    contexts: mx.array  # (n, context_size), what the drafter reads of the target at its last tokens
    roots: mx.array  # (n,) int32, what it chooses there
    drafts: mx.array  # (1, 1 + N) token ids of the rows to verify
    context_layers: tuple[int, ...]  # of the contexts


def inputs(target: Target, prompt: Sequence[int], place: Place, context_layers: tuple[int, ...]) -> Inputs:
    """Reads a prompt in one place."""
    with mx.stream(place):
        ids = mx.array([list(prompt)], mx.int32)
        hidden, logits = target.forward(ids, make_prompt_cache(target.model), context_layers=context_layers)
        assert hidden is not None
        roots = mx.argmax(logits[0, -CASES:], axis=-1).astype(mx.int32)
        found = Inputs(ids, hidden[0, -CASES:], roots, ids[:, 1 : 1 + len(PARENTS)], context_layers)
        mx.eval(found.contexts, roots, found.drafts)
    return found


def reading_seconds(target: Target, place: Place) -> float:
    """What all stages would take in one place, from the time of reading a single token there."""
    with mx.stream(place):
        begin = time.perf_counter()
        mx.eval(target.forward(mx.zeros((1, 1), mx.int32), make_prompt_cache(target.model))[1])
        return (time.perf_counter() - begin) * ROWS_READ


def tolerances(model: nn.Module, target: Target) -> tuple[float, float]:
    """How far results may be apart: at least, whatever rounding does in mlx-lm's own pass, and at most."""
    exact = target.dtype == mx.float32 and not is_quantized(model)
    return (1e-3, 0.05) if exact else (0.02, 0.2)


def every_way(found: Capability) -> list[Capability]:
    """All ways to read drafts that a target has for which trees are read as usual."""
    if found.kind == TREE and not found.split_rows:
        return [found, Capability(TREE, split_rows=True), Capability(CHAIN)]
    return [found]


def plain_stage(target: Target, given: Inputs) -> Stage:
    """mlx-lm's own pass, without anything of ours."""
    model = target.model
    return Stage(
        "plain pass (mlx-lm's own code)", lambda: {"logits": model(given.prompt, cache=make_prompt_cache(model))}
    )


def pair_stages(target: Target, drafter: Drafter, given: Inputs, ways: Sequence[Capability]) -> list[Stage]:
    """Drafter, beam search, capability, verification in each way, and commit."""
    found = [Stage("drafter", lambda: _drafted(target, drafter, given))]
    if isinstance(drafter, RecurrentDrafter):
        found.append(beam_stage(drafter, target.embed, given.contexts, given.roots))
    found.append(Stage("capability", lambda: _what_it_can(target)))
    for way in ways:
        how = {CHAIN: "a chain", TREE: "a tree, rows split" if way.split_rows else "a tree"}[way.kind]
        found.append(Stage(f"verification of {how}", functools.partial(_verified, target, way, given)))
    return [*found, Stage("commit", lambda: _committed(target, ways[0], given))]


def _drafted(target: Target, drafter: Drafter, given: Inputs) -> dict[str, mx.array]:
    context = given.contexts[-1:]
    if isinstance(drafter, DraftModel):
        return {"logits": drafter.prefill(given.prompt, None, drafter.make_cache())[1]}
    if isinstance(drafter, ContextReader):
        tokens = given.drafts[:, : given.contexts.shape[0]]
        contexts = given.contexts[None, : tokens.shape[1]]
        return {"logits": drafter.prefill(tokens, contexts, drafter.make_cache())[1]}
    if not isinstance(drafter, RecurrentDrafter):
        return {"logits": drafter(context)}
    projected, state, logits = drafter.project_context(context), None, []
    for i in range(3):
        state = drafter.advance(target.embed(given.drafts[:, i]), state)
        logits.append(drafter.logits(projected, state))
    assert state is not None
    found = {"state": state, "logits": mx.stack(logits)}
    if drafter.config.prefix_window:
        tokens = given.drafts[:, : given.contexts.shape[0]]
        found["prefix"] = drafter.prefix(given.contexts[None, : tokens.shape[1]], target.embed(tokens))
    return found


def _what_it_can(target: Target) -> dict[str, mx.array]:
    """The self-check's outcome, letter by letter."""
    found = probe(target)
    words = f"{found.kind}, {found.replay}{', rows split' if found.split_rows else ''}"
    return {f"kind ({words})": mx.array(len(found.mixers))}


def _read(target: Target, way: Capability, given: Inputs) -> tuple[KVCache, mx.array, mx.array]:
    """Cache after a tree of rows (a chain where that is the way), its hidden states and logits."""
    verifier = Verifier(target, way)
    cache = verifier.make_cache()
    target.forward(given.prompt, cache.layers)
    cache.begin_trees(length=given.prompt.shape[1])
    if way.kind == CHAIN:
        tree = CandidateTree.chain(given.drafts)
    else:
        tree = CandidateTree.from_parents(given.drafts, mx.array([PARENTS], mx.int32), max_depth=len(PATH) + 1)
    return cache, *verifier(tree, cache, given.context_layers)


def _verified(target: Target, way: Capability, given: Inputs) -> dict[str, mx.array]:
    _, hidden, logits = _read(target, way, given)
    return {"hidden states": hidden, "logits": logits}


def _committed(target: Target, way: Capability, given: Inputs) -> dict[str, mx.array]:
    """What the layers hold after a path was accepted, and what the target says next."""
    cache, _, _ = _read(target, way, given)
    path = None if way.kind == CHAIN else mx.array([[*PATH, PATH[-1]]], mx.int32)
    length = given.prompt.shape[1] + 1 + len(PATH)
    cache.commit(path, mx.array([len(PATH)], mx.int32), len(PARENTS) - 1 if path is None else path.shape[1])
    mx.eval(cache.length, cache.arrays())
    cache.tighten(length)
    cache.end_trees(length)
    _, logits = target.forward(given.prompt[:, :1], cache.layers)
    held: list[Any] = tree_flatten([layer.state for layer in cache.layers])  # type: ignore[assignment]
    arrays = [(name, array) for name, array in held if isinstance(array, mx.array)]
    rows = {f"rows {name}": array for name, array in arrays if mx.issubdtype(array.dtype, mx.floating)}
    return {"next logits": logits, **rows}
