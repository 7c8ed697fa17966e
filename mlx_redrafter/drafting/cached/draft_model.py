"""An ordinary mlx-lm model as a drafter of a larger one with the same tokenizer.

Knows nothing of how its rows get into its cache, nor of the target's hidden states.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import dequantize_model

from mlx_redrafter.drafting.drafter_files import DrafterBase
from mlx_redrafter.drafting.shape import LONGEST_BEAM
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.cache.kv_cache import KVCache
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import CHAIN, NONE, Verifier

SHARED = 0.98  # of the target's tokens; the others are special ones, which families rename and add to


@dataclasses.dataclass
class DraftModelConfig:
    """What is asked of a drafter's config, of a model.

    Attributes:
        vocab_size: rows of its embedding.
        scored: of its tokens, those that the target has, too.
        quantization: set where any of its weights are quantised.
    """

    vocab_size: int
    scored: int
    quantization: dict[str, int] | None = None
    target_fingerprint: dict[str, Any] | None = None
    right_by_depth: tuple[float, ...] = ()


class DraftModel(DrafterBase):
    """A small model beside the target.

    Args:
        model: an mlx-lm model.
        tokenizer: its own.
        quantization: of the model's config, if it is there.
    """

    method = "draft model"
    deepest = LONGEST_BEAM - 1

    def __init__(self, model: nn.Module, tokenizer: Any, quantization: dict[str, int] | None = None):
        super().__init__()
        self.model = model
        size = Target.of(model).vocab_size
        self.config = DraftModelConfig(size, size, quantization)
        self._tokenizer = tokenizer
        self._verifier: Verifier | None = None
        self.freeze()

    @property
    def verifier(self) -> Verifier:
        """What reads the model's rows, several continuations of a text among them."""
        known: Verifier | None = self._verifier
        if known is None or known.target is not Target.of(self.model):  # its modules were exchanged since
            known = self._verifier = verifier_of(self.model)
        return known

    @property
    def widest(self) -> int:
        return 1 if self.verifier.capability == CHAIN else self.config.scored

    def dequantize(self) -> None:
        if self.config.quantization is not None:
            self.model = dequantize_model(self.model)
            self.config.quantization = None

    def fit(self, target: Target, tokenizer: Any, name: str) -> None:
        """Looks at the tokenizers' contents.

        Raises:
            UserError: another tokenizer than the target's, or a model that nothing can be drafted with.
        """
        mine, theirs = (_tokens(each) for each in (self._tokenizer, tokenizer))
        same = sum(mine.get(token) == text for token, text in theirs.items())
        if same < SHARED * len(theirs):
            raise UserError(
                f"{name}: is a model with another tokenizer than the target's: {same} of its {len(theirs)} tokens are"
                " the same; a draft model has to be of the target's family"
            )
        if self.verifier.capability == NONE:
            raise UserError(f"{name}: this model cannot draft: {self.verifier.reason}")
        self.config.scored = min(self.config.vocab_size, target.vocab_size)

    def make_cache(self) -> KVCache:
        return self.verifier.make_cache()

    def prefill(self, tokens: mx.array, contexts: mx.array | None, cache: KVCache) -> tuple[mx.array | None, mx.array]:
        """Reads rows as a prompt; arguments as for `read`. Gives the last row's scores."""
        logits = self.verifier.target.forward(self._known(tokens), cache.layers)[1]
        return None, logits[:, -1:, : self.config.scored]

    def read(
        self, tree: CandidateTree, contexts: mx.array | None, cache: KVCache, at: mx.array | None = None
    ) -> tuple[mx.array | None, mx.array]:
        """Reads rows behind what the cache holds.

        Args:
            tree: M rows.
            contexts: not of interest to a model, which reads tokens alone.
            at: (B,) the one row to give; all if left out.

        Returns:
            None, for what its rows have to say to the rows behind them is in the cache, and their scores of the
            next token (B, M, scored).
        """
        known = dataclasses.replace(tree, tokens=self._known(tree.tokens))
        logits = self.verifier(known, cache)[1][..., : self.config.scored]
        return None, logits if at is None else mx.take_along_axis(logits, at[:, None, None], axis=1)

    def _known(self, tokens: mx.array) -> mx.array:
        """The same tokens; those that only the target has as another one."""
        return mx.minimum(tokens, self.config.vocab_size - 1)


def _tokens(tokenizer: Any) -> dict[int, str]:
    return {token: text for text, token in tokenizer.get_vocab().items()}
