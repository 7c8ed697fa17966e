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

    def __init__(self, target: Target):
        self.target = target
        self.capability, self.reason = self._probe()

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
        prompt = mx.arange(5, dtype=mx.int32)[None] % vocab
        tokens = (mx.arange(len(parents), dtype=mx.int32)[None] * 3 + 1) % vocab
        tree = CandidateTree.from_parents(tokens, mx.array([parents]), max_depth=len(parents) - 1)
        try:
            cache = self.make_cache()
            self.target.forward(prompt, cache.layers)
            cache.begin_trees()
            _, logits = self(tree, cache)
            differences = []
            for row in range(len(parents)):
                path = [row]
                while path[0]:
                    path.insert(0, parents[path[0]])
                alone = mx.concatenate([prompt, tokens[:, mx.array(path)]], axis=1)
                _, plain = self.target.forward(alone, make_prompt_cache(self.target.model))
                differences.append(mx.abs(logits[0, row] - plain[0, -1]).max() / mx.abs(plain[0, -1]).max())
            worst: Any = mx.max(mx.stack(differences)).item()
        except Exception as error:  # whatever a model's own code does with what it was handed
            return f"{type(error).__name__} {str(error).partition(chr(10))[0]}".strip()
        # Half-precision and quantised rows differ by rounding; a wrong position or mask by far more.
        exact = self.target.dtype == mx.float32 and not _is_quantized(self.target.model)
        if worst <= (1e-3 if exact else 0.1):
            return ""
        return f"logits differ from plain decoding by {worst:.2g} of their size"


def _is_quantized(model: nn.Module) -> bool:
    return any("scales" in module for module in model.modules())


def verifier_of(model: nn.Module) -> Verifier:
    """The verifier of an mlx-lm model, probed once per model."""
    # nn.Module keeps what is not an array or module as a plain attribute: no parameter is added.
    if (verifier := getattr(model, "_redrafter_verifier", None)) is None:
        verifier = model._redrafter_verifier = Verifier(Target(model))
    return verifier
