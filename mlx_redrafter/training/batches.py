"""Cuts the batch of an update from what the target made of rows of text.

Knows nothing of drafters.
"""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np

from mlx_redrafter.training.loss import Batch
from mlx_redrafter.training.teacher import Teacher

_COMPARED = 16  # rows that show what all begin with


class BatchMaker:
    """Cuts batches: which positions are unrolled how far, and what they read and learn.

    Args:
        seed: of the choice of positions.
        dtype: of hidden states and embeddings.
        tokens: whether the drafter reads tokens, and needs their embeddings.
        whole: whether it reads all of the text up to a position.
    """

    def __init__(
        self, teacher: Teacher, seed: int, dtype: mx.Dtype = mx.float32, tokens: bool = True, whole: bool = False
    ):
        self.teacher, self.seed, self.dtype, self.tokens, self.whole = teacher, seed, dtype, tokens, whole
        objective = teacher.objective
        self.steps = len(objective.step_weights)
        self.positions = teacher.rows.length - self.steps - 1  # the last step's token has to be in the row
        self.kept = [max(1, round(share * self.positions)) for share in objective.step_shares]
        self.positions_per_row = self.kept[0]
        self._common = 0  # tokens that all rows begin with
        if objective.prompts:
            first = teacher.rows[:_COMPARED][0]
            self._common = int(np.argmin((first == first[0]).all(axis=0)))

    def __call__(self, picks: np.ndarray, update: int, part: slice = slice(None)) -> Batch:
        """The batch of update number `update`.

        Args:
            picks: (B,) the rows of the update in all processes together.
            part: the rows of this process among them.
        """
        marks = self.teacher.rows[picks][1]
        if self.teacher.objective.prompts:  # everything up to the last token that counts
            marks = np.flip(np.maximum.accumulate(np.flip(marks, axis=1), axis=1), axis=1).copy()
            marks[:, : self._common] = False
        chosen, counted = zip(*(self._choose(row, update, i) for i, row in enumerate(marks)), strict=True)
        counts = np.maximum(1, np.sum([[c[k, :n].sum() for k, n in enumerate(self.kept)] for c in counted], axis=0))
        tokens, reading = self.teacher.read(picks[part])
        # Rank by rank over all rows, so that the first n_k of every row come first.
        at = np.stack(chosen[part]).T.reshape(-1)
        rows = np.tile(np.arange(len(tokens)), self.kept[0])
        learned = np.stack(counted[part]).transpose(1, 2, 0).reshape(self.steps, -1)
        embeddings, ids, shares, weights = [], [], [], []
        for k in range(self.steps):
            n = self.kept[k] * len(tokens)
            where = (rows[:n], at[:n] + k + 1)
            if self.tokens:
                embeddings.append(self.teacher.target.embed(mx.array(tokens[where])).astype(self.dtype))
            shares.append(mx.array(reading["shares"][where]))
            weights.append(mx.array(learned[k, :n] * reading["mass"][where].astype(np.float32)))
            if self.teacher.has_ids:
                ids.append(mx.array(reading["ids"][where].astype(np.int32)))
        candidates: list[mx.array] = []
        if 0 < self.teacher.objective.candidates < self.teacher.size and ids:
            candidates, ids, shares = self._among_candidates(ids, shares, update)
        hidden = mx.array(reading["hidden"][rows, at]).view(mx.bfloat16).astype(self.dtype)
        whole = []
        if self.whole:
            contexts = mx.array(reading["hidden"]).view(mx.bfloat16).astype(self.dtype)
            after = self.teacher.target.embed(mx.array(np.roll(tokens, -1, axis=1))).astype(self.dtype)
            whole = [contexts, after, mx.array(rows * tokens.shape[1] + at, mx.int32)]
        counted_in_all = mx.array(counts, mx.float32)
        return Batch(hidden, embeddings, ids, shares, weights, counted_in_all, whole, candidates)

    def _among_candidates(
        self, ids: list[mx.array], shares: list[mx.array], update: int
    ) -> tuple[list[mx.array], list[mx.array], list[mx.array]]:
        """The candidates of an update, and its labels among them.

        A label for which there is no room has no share; the rarest go first.
        """
        size, count = self.teacher.size, self.teacher.objective.candidates
        seen = np.bincount(np.concatenate([np.array(part).reshape(-1) for part in ids]), minlength=size)
        # Noise below 1 decides among those that are seen equally often, all that are not seen included.
        order = np.argsort(-(seen + np.random.default_rng((self.seed, update)).random(size)))
        chosen = np.sort(order[:count])
        place = np.zeros(size, np.int32)
        place[chosen] = np.arange(count)
        there = np.zeros(size, np.float32)
        there[chosen] = 1
        places, share_there = mx.array(place), mx.array(there)
        shares = [share * share_there[part] for share, part in zip(shares, ids, strict=True)]
        return [mx.array(chosen.astype(np.int32))], [places[part] for part in ids], shares

    def _choose(self, counted: np.ndarray, update: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions of one row in random order, those with something to learn first.

        Args:
            counted: (T,) bool, the tokens that are to be learned.

        Returns:
            (n_1,) positions and (K, n_1) float32 whether step k learns there.
        """
        order = np.random.default_rng((self.seed, update, index)).permutation(self.positions)
        order = order[np.argsort(~counted[order + 2], kind="stable")][: self.kept[0]]
        steps = np.arange(self.steps)[:, None]
        # Where a token of the way there does not count, another document or speaker has begun.
        return order, np.cumprod(counted[order + steps + 2], axis=0, dtype=np.float32)


def thinned(batch: Batch, share: float, draw: tuple[int, int, int]) -> Batch:
    """A batch whose contexts and embeddings lack a share of their numbers (dropout, of what a drafter reads).

    A drafter that sees a text often would else learn it by heart.

    Args:
        share: of the numbers that become 0; the others grow, so that the mean stays.
        draw: seed, update and first row, of which the choice depends.
    """
    if not share:
        return batch
    random = np.random.default_rng(draw)

    def thin(numbers: mx.array) -> mx.array:
        kept = mx.random.bernoulli(1 - share, numbers.shape, key=mx.random.key(int(random.integers(2**63))))
        return mx.where(kept, numbers / (1 - share), mx.zeros_like(numbers))

    whole = [*map(thin, batch.whole[:2]), *batch.whole[2:]]
    return dataclasses.replace(batch, hidden=thin(batch.hidden), embeddings=[*map(thin, batch.embeddings)], whole=whole)


class WholeRows:
    """Batches of whole rows, for models that read a text from its beginning: one step, every position.

    A position counts where the token after it is to be learned: what the target says there is
    about the same document.
    """

    def __init__(self, teacher: Teacher):
        self.teacher = teacher
        self.positions_per_row = teacher.rows.length

    def __call__(self, picks: np.ndarray, update: int, part: slice = slice(None)) -> Batch:
        """As `BatchMaker`; every update takes all positions."""
        counts = self.teacher.rows[picks][1]
        learned = np.concatenate([counts[:, 1:], np.zeros((len(counts), 1), bool)], axis=1)
        tokens, reading = self.teacher.read(picks[part])
        shares = reading["shares"].reshape(-1, reading["shares"].shape[-1])
        ids = []
        if self.teacher.has_ids:
            ids.append(mx.array(reading["ids"].reshape(shares.shape).astype(np.int32)))
        weights = (learned[part] * reading["mass"].astype(np.float32)).reshape(-1)
        total = mx.array([max(1, int(learned.sum()))], mx.float32)
        return Batch(mx.zeros((0,)), [], ids, [mx.array(shares)], [mx.array(weights)], total, tokens=[mx.array(tokens)])
