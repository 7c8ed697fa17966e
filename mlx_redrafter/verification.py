"""One forward pass of the target over all rows of a tree, and whether a model can do that."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache as PlainKVCache
from mlx_lm.models.cache import make_prompt_cache

from .kv_cache import KVCache, LayerCache
from .target import Target
from .tree import CandidateTree

TREE, CHAIN, NONE = "tree", "chain", "none"


class Verifier:
    """Verifies trees with a target, as far as that target allows.

    Whether a model can is never assumed from its name: a small tree is verified against
    plain decoding, and the outcome is the capability.

    Attributes:
        capability: "tree" (any tree can be verified), "chain" (only consecutive
            positions, so beam width 1) or "none" (decode without drafts).
        reason: why the capability is not "tree", for people; empty otherwise.
    """

    def __init__(self, target: Target, known: tuple[str, str] | None = None):
        self.target = target
        self.capability, self.reason = known or self._probe()

    def make_cache(self) -> KVCache:
        """An empty cache that trees can be written to (not for capability "none")."""
        return KVCache([LayerCache() for _ in make_prompt_cache(self.target.model)])

    def __call__(self, tree: CandidateTree, cache: KVCache) -> tuple[mx.array, mx.array]:
        """Reads all rows of a tree in one call of the model.

        The rows land in the cache behind the committed ones; `KVCache.commit` keeps a path.

        Args:
            tree: 1 + N rows, the root first.
            cache: of which `begin_trees` was called.

        Returns:
            hidden (B, 1 + N, hidden_size) and logits (B, 1 + N, vocab_size).
        """
        with cache.reading(tree.ancestors, tree.depths, chain=self.capability == CHAIN) as layers:
            hidden, logits = self.target.forward(tree.tokens, layers)
        assert hidden is not None  # capability "none" otherwise
        return hidden, logits

    def _probe(self) -> tuple[str, str]:
        if self.target.missing:
            return NONE, self.target.missing
        kinds = {type(c) for c in make_prompt_cache(self.target.model)}
        if kinds != {PlainKVCache}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds - {PlainKVCache}))
            return NONE, f"its layers with a {names} cannot take back rejected tokens yet"
        reasons: list[str] = []
        for capability, parents in ((TREE, [0, 0, 0, 1, 2]), (CHAIN, [0, 0, 1])):
            self.capability = capability
            if not (error := self._difference(parents)):
                return capability, "; ".join(reasons)
            reasons.append(f"{capability} verification: {error}")
        return NONE, "; ".join(reasons)

    def _difference(self, parents: list[int]) -> str:
        """Empty if a tree with these parents verifies like plain decoding does, else what went wrong."""
        vocab = self.target.vocab_size
        prompt = (mx.arange(24, dtype=mx.int32)[None] * 7 + 3) % vocab
        tokens = (mx.arange(len(parents), dtype=mx.int32)[None] * 3 + 1) % vocab
        tree = CandidateTree.from_parents(tokens, mx.array([parents]), max_depth=len(parents) - 1)
        try:
            cache = self.make_cache()
            self.target.forward(prompt, cache.layers)
            cache.begin_trees()
            _, logits = self(tree, cache)
            differences, noise = [], []
            for row in range(len(parents)):
                path = [row]
                while path[0]:
                    path.insert(0, parents[path[0]])
                alone = mx.concatenate([prompt, tokens[:, mx.array(path)]], axis=1)
                plain, stepwise = make_prompt_cache(self.target.model), make_prompt_cache(self.target.model)
                _, expected = self.target.forward(alone, plain)
                self.target.forward(alone[:, :-1], stepwise)
                _, again = self.target.forward(alone[:, -1:], stepwise)
                differences.append(_distance(logits[0, row], expected[0, -1]))
                noise.append(_distance(again[0, -1], expected[0, -1]))
            worst: Any = mx.max(mx.stack(differences)).item()
            rounding: Any = mx.max(mx.stack(noise)).item()
        except Exception as error:  # whatever a model's own code does with what it was handed
            return f"{type(error).__name__} {str(error).partition(chr(10))[0]}".strip()
        # Half-precision and quantised rows differ by rounding, which plain decoding shows as
        # well: reading the last token alone against reading it with all the others.
        exact = self.target.dtype == mx.float32 and not _is_quantized(self.target.model)
        if worst <= max(1e-3 if exact else 0.02, 3 * rounding):
            return ""
        return f"logits differ from plain decoding by {worst:.2g} of their size"


def _distance(found: mx.array, expected: mx.array) -> mx.array:
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    return mx.abs(found - expected).max() / mx.abs(expected).max()


def _is_quantized(model: nn.Module) -> bool:
    return any("scales" in module for module in model.modules())


def verifier_of(model: nn.Module) -> Verifier:
    """The verifier of an mlx-lm model, probed once per model."""
    # nn.Module keeps what is neither array nor module as a plain attribute: no parameter is
    # added. Only the outcome is kept, or the model would own itself in a circle.
    verifier = Verifier(Target(model), getattr(model, "_redrafter_capability", None))
    model._redrafter_capability = (verifier.capability, verifier.reason)
    return verifier
