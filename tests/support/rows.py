"""Rows of text in memory, and what a target makes of them."""

import numpy as np

from mlx_redrafter.training.loss import Objective
from mlx_redrafter.training.teacher import Teacher

VOCAB = 97


class TextRows:
    """Rows in memory, all of them to be learned unless told otherwise."""

    held_out = 0

    def __init__(self, tokens, counts=None):
        self.tokens, self.length = np.asarray(tokens, np.int32), tokens.shape[1]
        self.counts = np.ones(tokens.shape, bool) if counts is None else counts

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, picks):
        return self.tokens[picks], self.counts[picks]


def random_rows(count=2, length=12, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, (count, length)).astype(np.int32)


def teacher_of(target, rows, folder, objective=None, vocab_map=None, budget=0, layers=()):
    rows = rows if isinstance(rows, TextRows) else TextRows(rows)
    return Teacher(target, rows, objective or Objective(), vocab_map, folder, budget, layers)
