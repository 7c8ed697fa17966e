"""A batch takes what the weights take, what its texts have to keep, and little more.

`BATCH_PAIR="TARGET DRAFTER" pytest -s -m "" tests/promises/test_batch_memory.py` prints how much more for another pair.
"""

import mlx.core as mx
import pytest
from support.memory import PAIR, Peaks

import mlx_redrafter
from mlx_redrafter.decoding.batch import Batch
from mlx_redrafter.decoding.batch_text import BatchText
from mlx_redrafter.decoding.planner import BatchPlanner
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.text.batches.generate import proposers

LENGTHS = [300, 12, 45, 120, 40, 80, 30, 200, 64, 9, 150, 90, 25, 100, 60, 1]  # of prompts, in tokens


@pytest.fixture(scope="module")
def pair():
    model, drafter, tokenizer = mlx_redrafter.load(*PAIR)
    mx.eval(model.parameters(), drafter.parameters())
    return model, drafter, tokenizer


@pytest.mark.parametrize(
    "texts", [1, pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow), 16]
)
@pytest.mark.parametrize("plan", [PLAIN, Drafted(DraftShape(1, 3, 2))], ids=["plain", "drafted"])
def test_peak(pair, plan, texts):
    """If this fails, prompts, joining, leaving or a step take memory that nobody has planned with.

    The pair is small: a step's logits, or those of a whole prompt, are a larger share of it than of any other.
    """
    model, drafter, _ = pair
    verifier = verifier_of(model)
    batch = Batch(verifier, proposers(verifier, None if plan == PLAIN else drafter), BatchPlanner(plan))
    mx.clear_cache()
    watched = Peaks(batch, mx.get_active_memory())
    for n, length in enumerate(LENGTHS[:texts]):
        options = DecodingOptions(max_tokens=8 + 3 * n, keep_logits=False)
        batch.add(BatchText([5 + (7 * i + n) % 900 for i in range(length)], options))
    while len(batch):
        watched.step()
    peak, planned = watched.worst
    print(f"\n{texts} texts, {plan}: {watched.most:.1%} beyond {planned / 1e6:.0f} MB ({peak / 1e6:.0f} MB)")
    assert watched.most < (0.055 if PAIR else 0.075)
