"""What a model can be used for, found out by using it: trees, chains, or plain decoding only.

Nothing is assumed from a model's name. A few small trees are verified one after the other,
a path of each is committed, and every row's logits are compared with plain decoding by
mlx-lm's own caches. Windows are made short for that, so that the trees lie before, across
and past the place where a window wraps. The check reads about 30 tokens, most of them one
at a time.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, RotatingKVCache, make_prompt_cache

from mlx_redrafter.target.cache.kv_cache import KVCache, leaves, refused
from mlx_redrafter.target.cache.recurrent import LENGTHS, ROWS, find_mixers
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.tree import CandidateTree

TREE, CHAIN, NONE = "tree", "chain", "none"

PROMPT = 12  # tokens read before the first tree
WINDOW = 16  # of the layers that have one, during the check
ROUNDS = 3
PARENTS = [0, 0, 0, 1, 2]  # of each round's tree
PATH = [0, 2, 4]  # what is accepted of it


@dataclasses.dataclass(frozen=True)
class Capability:
    """What the check found.

    Attributes:
        kind: TREE (any tree can be verified), CHAIN (consecutive positions only) or NONE.
        reason: why it is not TREE, for people; empty otherwise.
        apart: trees are read with each row as a batch entry of its own, which costs reading
            the keys and values once per row.
        way: how layers with a state take rows back; see `state_cache`.
        mixers: paths of the modules that read and write such a state.
    """

    kind: str
    reason: str = ""
    apart: bool = False
    way: str = LENGTHS
    mixers: tuple[str, ...] = ()


def read(target: Target, capability: Capability, tree: CandidateTree, cache: KVCache) -> tuple[mx.array, mx.array]:
    """Reads all rows of a tree in one call of the model; they land behind the committed ones.

    Returns:
        hidden (B, 1 + N, hidden_size) and logits (B, 1 + N, vocab_size).
    """
    apart = capability.apart
    with cache.reading(tree.ancestors, tree.depths, capability.kind == CHAIN, apart) as positions:
        tokens = tree.tokens.reshape(-1, 1) if apart else tree.tokens
        hidden, logits = target.forward(tokens, cache.layers, positions)
    assert hidden is not None  # the kind is NONE otherwise
    if apart:
        hidden, logits = (x.reshape(*tree.tokens.shape, x.shape[-1]) for x in (hidden, logits))
    return hidden, logits


def probe(target: Target) -> Capability:
    """Finds out what a model can be used for."""
    if target.missing:
        return Capability(NONE, target.missing)
    try:
        kinds = make_prompt_cache(target.model)
        if names := refused(kinds):
            return Capability(NONE, f"its layers with a {names} cannot take back rejected tokens")
        recurrent = any(isinstance(cache, ArraysCache) for cache in leaves(kinds))
        mixers = find_mixers(target.model, KVCache.adopt(kinds).layers) if recurrent else ()
        plain = _Plain(target)
    except Exception as error:  # whatever a model's own code does with what it was handed
        return Capability(NONE, f"it does not decode: {_words(error)}")
    if plain.doubt:
        return Capability(NONE, "mlx_lm reads several tokens at once otherwise than one by one")
    reasons: list[str] = []
    if recurrent:
        reasons = ["layers with a state read one continuation only"]
        tries = [Capability(CHAIN, way=way, mixers=mixers) for way in (LENGTHS, ROWS)]
    else:
        tries = [Capability(TREE), Capability(TREE, apart=True), Capability(CHAIN)]
    errors = []
    for capability in tries:
        problem = _difference(target, capability, plain)
        if not problem:
            return dataclasses.replace(capability, reason="" if capability.kind == TREE else "; ".join(reasons))
        how = f" (by {capability.way})" if recurrent else " (rows apart)" if capability.apart else ""
        name = f"{capability.kind} verification{how}"
        errors.append(f"{name}: {problem}")
        if not recurrent:
            reasons = errors
    return Capability(NONE, "; ".join(errors))


class _Plain:
    """What plain decoding says at every row of every round's tree.

    Attributes:
        prompt: (1, PROMPT) token ids.
        tokens: per round, (1, M) ids of the tree.
        logits: per round, (M, vocab_size).
        states: of layers that have one, after the prompt and so many accepted tokens.
        tolerance: how far rounding may take us from it.
        doubt: mlx_lm itself says something else when it reads tokens together than when one by one.
    """

    def __init__(self, target: Target):
        vocab, rows = target.vocab_size, len(PARENTS)
        self.prompt = (mx.arange(PROMPT, dtype=mx.int32)[None] * 7 + 3) % vocab
        self.tokens = [(mx.arange(rows, dtype=mx.int32)[None] * 3 + 5 * i + 1) % vocab for i in range(ROUNDS)]
        self.logits = []
        cache = short_cache(target.model)
        _, first = target.forward(self.prompt, cache)
        for tokens in self.tokens:
            caches, logits = [cache], []
            for row, parent in enumerate(PARENTS):
                mine = cache if not row else copy.deepcopy(caches[parent + 1])
                caches.append(mine)
                logits.append(target.forward(tokens[:, row : row + 1], mine)[1][0, -1])
                if not row:  # its children go on from what it left, not from what it will become
                    caches[1] = copy.deepcopy(mine)
                mx.eval(logits[-1], [c.state for c in mine])
            cache = caches[PATH[-1] + 1]
            self.logits.append(mx.stack(logits))
        self.states = self._states(target)
        stepwise = short_cache(target.model)
        target.forward(self.prompt[:, :-1], stepwise)
        _, again = target.forward(self.prompt[:, -1:], stepwise)
        noise: Any = _distance(again[0, -1], first[0, -1]).item()
        # Half-precision and quantised rows differ by rounding, which plain decoding shows as well.
        exact = target.dtype == mx.float32 and not is_quantized(target.model)
        self.tolerance = 1e-3 if exact else min(max(0.02, 3 * noise), 0.2)
        self.doubt = noise > self.tolerance

    @property
    def accepted(self) -> mx.array:
        """(1, n) the tokens accepted in all rounds."""
        return mx.concatenate([tokens[:, mx.array(PATH)] for tokens in self.tokens], axis=1)

    def _states(self, target: Target) -> list[list[mx.array]]:
        cache = short_cache(target.model)
        if not any(isinstance(leaf, ArraysCache) for leaf in leaves(cache)):
            return []
        target.forward(self.prompt, cache)
        states = [_state_arrays(cache)]
        for at in range(self.accepted.shape[1]):
            target.forward(self.accepted[:, at : at + 1], cache)
            states.append(_state_arrays(cache))
            mx.eval(states[-1])
        return states


def _state_arrays(layers: list[Any]) -> list[Any]:
    return [array for cache in leaves(layers) if isinstance(cache, ArraysCache) for array in cache.cache]


def short_cache(model: nn.Module) -> list[Any]:
    """mlx-lm's caches for a model, with windows that wrap soon."""
    cache = make_prompt_cache(model)
    for leaf in leaves(cache):
        if isinstance(leaf, RotatingKVCache):
            leaf.max_size = min(leaf.max_size, WINDOW)
    return cache


def _difference(target: Target, capability: Capability, plain: _Plain) -> str:
    """Empty if verification says what plain decoding does, else what went wrong."""
    target = Target(target.model, capability.mixers)
    try:
        cache = KVCache.adopt(short_cache(target.model), capability.way)
        target.forward(plain.prompt, cache.layers)
        cache.begin_trees(length=PROMPT)
        rounds = _trees(plain) if capability.kind == TREE else _chains(plain)
        worst = 0.0
        for tree, expected, path in rounds:
            _, logits = read(target, capability, tree, cache)
            count, most = mx.array([path.shape[1]], mx.int32), tree.max_depth
            cache.commit(path if capability.kind == TREE else None, count, most)
            distances = mx.stack([_distance(found, wanted) for found, wanted in zip(logits[0], expected)])
            length: Any = cache.length
            cache.tighten(length.item())
            distance: Any = distances.max().item()
            worst = max(worst, distance)
            if plain.states:
                states = zip(_state_arrays(cache.layers), plain.states[length.item() - PROMPT])
                distance = mx.stack([_distance(found, wanted) for found, wanted in states if wanted is not None]).max()
                worst = max(worst, distance.item())
    except Exception as error:  # as above
        return _words(error)
    if not worst <= plain.tolerance:
        return f"logits differ from plain decoding by {worst:.2g} of their size"
    return ""


def _trees(plain: _Plain) -> list[tuple[CandidateTree, mx.array, mx.array]]:
    path = mx.array([PATH[1:]], mx.int32)
    parents = mx.array([PARENTS], mx.int32)
    return [
        (CandidateTree.from_parents(tokens, parents, len(PATH) - 1), logits, path)
        for tokens, logits in zip(plain.tokens, plain.logits)
    ]


def _chains(plain: _Plain) -> list[tuple[CandidateTree, mx.array, mx.array]]:
    """The accepted tokens of all rounds as overlapping chains of three, of which two are accepted."""
    tokens = plain.accepted
    logits = mx.concatenate([x[mx.array(PATH)] for x in plain.logits])
    parents = mx.array([[0, 0, 1]], mx.int32)
    return [
        (CandidateTree.from_parents(tokens[:, at : at + 3], parents, 2), logits[at : at + 3], mx.array([[1]], mx.int32))
        for at in range(0, tokens.shape[1] - 2, 2)
    ]


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
