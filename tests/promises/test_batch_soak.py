"""A batch in which texts come and go for long is as fast and as small at its end as at its beginning.

    BATCH_SOAK_MINUTES=30 pytest -s -m slow tests/promises/test_batch_soak.py

prints how long tokens took and what memory was. BATCH_PAIR="TARGET DRAFTER" takes another pair than the embedded
one, and BATCH_SOAK_BETWEEN=1.5 so many seconds between two texts, which is for the pair to keep up with.
"""

from __future__ import annotations

import os
import random
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from support.memory import PAIR, Peaks, resident

import mlx_redrafter
from mlx_redrafter.decoding.batch import Batch
from mlx_redrafter.decoding.batch_text import BatchText
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.text.batches.generate import proposers
from mlx_redrafter.tuning.batch_controller import batch_planner
from mlx_redrafter.tuning.session import verifier_for

MINUTES = float(os.environ.get("BATCH_SOAK_MINUTES", "0.5"))
MEAN, MOST = float(os.environ.get("BATCH_SOAK_BETWEEN", "0.15")), 16  # seconds between two arrivals; texts at once
PARTS = 8  # of the soak, after each of which memory is looked at


class Soak:
    """Texts of random length that arrive at random times."""

    def __init__(self):
        model, drafter, _ = mlx_redrafter.load(*PAIR)
        mx.clear_cache()
        self.weights = mx.get_active_memory()
        verifier = verifier_for(model, drafter)
        planner, _ = batch_planner(verifier, drafter, None)
        self.batch = Batch(verifier, proposers(verifier, drafter), planner, most_texts=MOST)
        self.watched = Peaks(self.batch, self.weights)
        self.chance, self.began, self.told = random.Random(1), {}, {}
        self.first, self.later, self.texts = [], [], 0

    def run(self, seconds):
        end, due = time.perf_counter() + seconds, 0.0
        while (now := time.perf_counter()) < end or len(self.batch):
            while due <= now < end and len(self.batch) < 2 * MOST:
                prompt = [self.chance.randrange(3, 200) for _ in range(self.chance.choice([1, 9, 40, 200]))]
                limit = self.chance.choice([1, 20, 60, 150])
                text = BatchText(prompt, DecodingOptions(max_tokens=limit, keep_logits=False))
                self.batch.add(text)
                self.began[text] = now
                due = max(due, now - 1) + self.chance.expovariate(1 / MEAN)
            for part in self.watched.step():
                self.note(part.text, len(part.produced.tokens), time.perf_counter())

    def note(self, text, tokens, now):
        if text in self.told:
            self.later += [(now - self.told[text]) / tokens] * tokens
        else:
            self.first.append(now - self.began.pop(text))
        self.told[text] = now
        if text.ended:
            del self.told[text]
            self.texts += 1


@pytest.mark.slow
@pytest.mark.timeout(66 * MINUTES + 180)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_texts_come_and_go(tmp_path, monkeypatch):
    """If this fails, a server that batches for days runs out of memory."""
    monkeypatch.setenv("MLX_REDRAFTER_TUNING", str(tmp_path))
    soak = Soak()
    soak.run(0.3 * 60 * MINUTES)  # buffers are as long as they get
    before, active = resident() / 1024, mx.get_active_memory()
    drift = [before]
    for _ in range(PARTS):
        soak.run(0.7 * 60 * MINUTES / PARTS)
        drift.append(resident() / 1024)
    print(f"\n{soak.texts} texts; resident MB:", *(f"{found:.0f}" for found in drift))
    for name, values in (("first token", soak.first), ("each later token", soak.later)):
        print(name, *(f"p{share}: {np.percentile(values, share) * 1e3:.1f} ms" for share in (50, 95, 99)))
    watched, [peak, planned] = soak.watched, soak.watched.worst
    print(f"weights {soak.weights / 1e6:.1f} MB, caches at most {watched.caches / 1e6:.1f} MB,", end=" ")
    print(f"beyond them at most {watched.most:.1%}: {peak / 1e6:.1f} MB where {planned / 1e6:.1f} MB are planned")
    assert not soak.began and not soak.told and soak.texts > 10
    assert drift[-1] < 1.1 * before + 20
    assert mx.get_active_memory() < 1.05 * active + 1e6
