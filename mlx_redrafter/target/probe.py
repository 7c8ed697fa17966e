"""Finds out what a model can verify by trying: trees, chains, or plain decoding only.

Knows nothing of model names. A few small trees are verified one after the other, a path of
each is committed, and every row's logits are compared with plain decoding through mlx-lm's
own caches. Windows are made short, so that the trees lie before, across and past the place
where a window wraps. The probe reads about 30 tokens, most of them one at a time.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, RotatingKVCache, make_prompt_cache

from mlx_redrafter.target.cache.attention import in_one_piece
from mlx_redrafter.target.cache.kv_cache import KVCache, leaves, refused
from mlx_redrafter.target.cache.recurrent import AT_ONCE, ROW_BY_ROW
from mlx_redrafter.target.cache.replay import find_mixers
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import CHAIN, NONE, TREE, Capability, Verifier

T = TypeVar("T")

PROMPT = 12  # tokens read before the first tree
WINDOW = 16  # of the layers that have one, during the probe
ROUNDS = 3
PARENTS = (0, 0, 0, 1, 2)  # of each round's tree
PATH = (0, 2, 4)  # rows of it that are accepted
SPLIT = "its rope takes no position per row, so a tree's rows are verified as a batch, each reading all keys and values"


def verifier_of(model: nn.Module) -> Verifier:
    """The verifier of an mlx-lm model, probed once per model."""
    target = Target.of(model)
    # nn.Module keeps what is neither array nor module as a plain attribute: no parameter is added.
    if (found := getattr(model, "_redrafter_capability", None)) is None:
        found = model._redrafter_capability = probe(target)
    return Verifier(target, found)


def probe(target: Target) -> Capability:
    """What a model can be used for."""
    if target.missing:
        return Capability(NONE, target.missing)
    try:
        kinds = make_prompt_cache(target.model)
        if problem := apart(target, kinds):  # first, since what follows goes by the kinds
            return Capability(NONE, problem)
        if names := refused(kinds):
            return Capability(NONE, f"its layers with a {names} cannot take back rejected tokens")
        recurrent = any(isinstance(cache, ArraysCache) for cache in leaves(kinds))
        with in_one_piece():  # nobody computes it
            mixers = find_mixers(target.model, KVCache(kinds).layers) if recurrent else ()
        tolerance, noise = _rounding(target)
        if noise > tolerance:
            return Capability(NONE, "batched and token-by-token logits differ in mlx-lm itself")
        chains = _chains(target) if recurrent else []
        trees = [] if recurrent else _trees(target)
    except Exception as error:  # whatever a model's own code does with what it was handed
        return Capability(NONE, f"mlx-lm cannot decode with it: {_words(error)}")
    if recurrent:
        tries = [Capability(CHAIN, replay=replay, mixers=mixers) for replay in (AT_ONCE, ROW_BY_ROW)]
    else:
        tries = [Capability(TREE), Capability(TREE, SPLIT, split_rows=True), Capability(CHAIN)]
    problems: list[str] = []
    for found in tries:
        if found.kind == CHAIN and not chains:
            chains = _chains(target)
        problem = _problem(Verifier(target, found), chains if found.kind == CHAIN else trees, tolerance)
        if not problem:
            if found.kind == TREE:
                return found
            reason = "layers with a recurrent state verify one continuation at a time" if recurrent else ""
            return dataclasses.replace(found, reason=reason or "; ".join(problems))
        how = f", replayed {found.replay}" if recurrent else ", rows split" if found.split_rows else ""
        problems.append(f"{found.kind} verification{how}: {problem}")
    return Capability(NONE, "; ".join(problems))


@dataclasses.dataclass
class _Round:
    """One tree to verify, and what plain decoding says of it.

    Attributes:
        path: (1, D) the accepted rows without the root.
        logits: (M, vocab_size) of every row.
        states: arrays of layers with a recurrent state after the accepted rows.
    """

    tree: CandidateTree
    path: mx.array
    logits: mx.array
    states: list[mx.array]


def _trees(target: Target) -> list[_Round]:
    """Trees whose rows plain decoding reads one by one, each from a copy of its parent's cache."""
    cache, rounds = short_cache(target.model), []
    _read(target, _prompt(target), cache)
    for at in range(ROUNDS):
        tokens = (mx.arange(len(PARENTS), dtype=mx.int32)[None] * 3 + 5 * at + 1) % target.vocab_size
        caches: list[Any] = []
        logits = []
        for row, parent in enumerate(PARENTS):
            caches.append(copy.deepcopy(caches[parent]) if row else cache)
            logits.append(_read(target, tokens[:, row : row + 1], caches[row])[0, -1])
        cache = caches[PATH[-1]]
        rounds.append(_Round(CandidateTree.static(tokens, PARENTS), mx.array([PATH[1:]]), mx.stack(logits), []))
    return rounds


def _chains(target: Target) -> list[_Round]:
    """Overlapping chains of three, of which two rows are accepted."""
    cache, logits, states = short_cache(target.model), [], []
    _read(target, _prompt(target), cache)
    tokens = (mx.arange(ROUNDS * len(PATH), dtype=mx.int32)[None] * 5 + 1) % target.vocab_size
    for at in range(tokens.shape[1]):
        logits.append(_read(target, tokens[:, at : at + 1], cache)[0, -1])
        states.append(_state_arrays(cache))
    rounds = []
    for at in range(0, tokens.shape[1] - 2, 2):
        chain = CandidateTree.chain(tokens[:, at : at + 3])
        rounds.append(_Round(chain, mx.array([[1]]), mx.stack(logits[at : at + 3]), states[at + 1]))
    return rounds


def _problem(verifier: Verifier, rounds: list[_Round], tolerance: float) -> str:
    """Empty if verification says what plain decoding does, else what went wrong."""
    problem, distances = "", list[Any]()
    try:
        cache = verifier.make_cache(short_cache(verifier.target.model))
        _read(verifier.target, _prompt(verifier.target), cache.layers)
        cache.begin_trees(length=PROMPT)
        for expected in rounds:
            logits = _on_all(verifier.target, functools.partial(_verified, verifier, expected, cache))
            pairs = [*zip(logits[0], expected.logits), *zip(_state_arrays(cache.layers), expected.states)]
            found: Any = mx.stack([_distance(*pair) for pair in pairs if pair[1] is not None]).tolist()
            distances += found
            length: Any = cache.length
            cache.tighten(length.item())
    except Exception as error:  # as above
        problem = _words(error)
    if verifier.target.ranks is not None:  # that rounding differs is no reason for ranks to go different ways
        problem, distances = verifier.target.ranks.share((problem, distances))
    if problem:
        return problem
    wrong = [distance for distance in distances if not distance <= tolerance]  # what is no number is wrong as well
    return f"logits differ from plain decoding by {max(wrong):.2g} of their size" if wrong else ""


def _verified(verifier: Verifier, expected: _Round, cache: KVCache) -> mx.array:
    """The logits (1, M, vocab_size) of a round's rows, of which its path is committed."""
    tree, path = expected.tree, expected.path
    _, logits = verifier(tree, cache)
    cache.commit(None if tree.in_order else path, mx.array([path.shape[1]]), tree.max_depth)
    return logits


def _rounding(target: Target) -> tuple[float, float]:
    """How far apart equal logits may be, and how far apart mlx-lm's own are, read together and one by one."""
    prompt, together, apart = _prompt(target), short_cache(target.model), short_cache(target.model)
    first = _read(target, prompt, together)
    _read(target, prompt[:, :-1], apart)
    again = _read(target, prompt[:, -1:], apart)
    noise: Any = _distance(again[0, -1], first[0, -1]).item()
    if target.ranks is not None:
        noise = target.ranks.share(noise)
    # Half-precision and quantised rows differ by rounding, which plain decoding shows as well.
    exact = target.dtype == mx.float32 and not is_quantized(target.model)
    return (1e-3 if exact else min(max(0.02, 3 * noise), 0.2)), noise


def _read(target: Target, tokens: mx.array, cache: list[Any]) -> mx.array:
    """The logits of one call, computed before the next: what processes of a pipeline send would cross otherwise."""
    _, logits = _on_all(target, lambda: target.forward(tokens, cache))
    mx.eval(logits, [c.state for c in cache])
    return logits


def apart(target: Target, kinds: list[Any]) -> str:
    """Why the processes of a pipeline would go different ways: each of them goes by the caches of its own layers."""
    if target.ranks is None:
        return ""
    mine = sorted({type(cache).__name__ for cache in leaves(kinds)})
    alike = mine == target.ranks.share(mine)
    return target.ranks.first_of("" if alike else "the processes of this pipeline have layers of other kinds each")


def _on_all(target: Target, call: Callable[[], T]) -> T:
    """What a call builds; where it fails in one of several processes, it fails in all, and none begins to compute."""
    if target.ranks is None:
        return call()
    found, problem = [], ""
    try:
        with in_one_piece():
            found.append(call())
    except Exception as error:  # as above
        problem = _words(error)
    if problem := target.ranks.first_of(problem):
        raise RuntimeError(problem)
    return found[0]


def _prompt(target: Target) -> mx.array:
    return (mx.arange(PROMPT, dtype=mx.int32)[None] * 7 + 3) % target.vocab_size


def short_cache(model: nn.Module) -> list[Any]:
    """mlx-lm's caches for a model, with windows that wrap soon."""
    cache = make_prompt_cache(model)
    for leaf in leaves(cache):
        if isinstance(leaf, RotatingKVCache):
            leaf.max_size = min(leaf.max_size, WINDOW)
    return cache


def _state_arrays(layers: list[Any]) -> list[Any]:
    return [array for cache in leaves(layers) if isinstance(cache, ArraysCache) for array in cache.cache]


def _distance(found: mx.array, expected: mx.array) -> mx.array:
    """The largest difference, relative to the largest value; some models set some logits to -inf."""
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    difference = mx.where(found == expected, 0, mx.abs(found - expected))
    size = mx.where(mx.isinf(expected), 0, mx.abs(expected)).max()
    return difference.max() / mx.maximum(size, 1e-6)


def is_quantized(model: nn.Module) -> bool:
    """Whether any of its weights are."""
    return any("scales" in module for module in model.modules())


def _words(error: Exception) -> str:
    return f"{type(error).__name__} {str(error).partition(chr(10))[0]}".strip()
