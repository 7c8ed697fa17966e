"""Text that the target writes: it is the target's own, row by row."""

import mlx.core as mx
import numpy as np
import pytest
from support import make_model
from support.texts import own_text

from mlx_redrafter.training.text import writing
from mlx_redrafter.training.text.writing import weights_digest, write


def test_prompts_of_all_lengths(pair, prefixes):
    """If this fails, rows that are padded on the left are not the target's own text."""
    model, *_ = pair
    prompts = [prefixes[i][:n] for i, n in enumerate((9, 3, 17, 9, 1))]
    written = write(model, prompts, 24, [0.0] * 5, (), (0,), batch_size=3)
    for prompt, tokens in zip(prompts, written, strict=True):
        assert tokens == own_text(model, prompt, 24 - len(prompt))


@pytest.mark.parametrize("same_length", [True, False])
def test_rows_end_and_leave_the_batch(same_length, monkeypatch):
    """If this fails, a row goes on after its end, or takes over another's text when that ends."""
    monkeypatch.setattr(writing, "LOOK_EVERY", 3)
    model = make_model(vocab=23)
    prompts = [[i, i + 1, i + 2][: 3 if same_length else 1 + i % 3] for i in range(12)]
    ends, sizes = (1, 5, 7), []

    class Watched:  # the model, telling how many rows each call has
        def __call__(self, tokens, cache):
            sizes.append(tokens.shape[0])
            return model(tokens, cache=cache)

        def __getattr__(self, name):
            return getattr(model, name)

    written = write(Watched(), prompts, 40, [0.0] * 12, ends, (0,), batch_size=12)
    for prompt, tokens in zip(prompts, written, strict=True):
        assert tokens == own_text(model, prompt, 40 - len(prompt), ends)
    assert len({len(tokens) for tokens in written}) > 3 and sizes[0] == 12 and 1 <= sizes[-1] < 9


def test_temperatures_and_seeds():
    """If this fails, rows of one batch share their noise or their temperature."""
    model = make_model()
    prompts, heat = [[3, 4]] * 6, [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    first, again = (write(model, prompts, 30, heat, (), (0, 1)) for _ in range(2))
    other = write(model, prompts, 30, heat, (), (0, 2))
    assert first == again
    greedy = own_text(model, [3, 4], 28)
    for row, temp in enumerate(heat):
        assert (first[row] == greedy) == (temp == 0)
        assert (first[row] == other[row]) == (temp == 0)
    assert first[1] != first[2]
    warm = write(model, prompts, 30, [0.0] * 6, (), (0, 1), warm_up=2)
    assert len({tuple(tokens[:2]) for tokens in warm}) > 3
    for tokens in warm:
        assert tokens[2:] == own_text(model, [3, 4, *tokens[:2]], 26)


def test_samples_follow_the_model():
    """If this fails, text at a temperature is not the target's at that temperature."""
    model = make_model(vocab=11)
    model.lm_head.weight = 0.3 * model.lm_head.weight
    for temp in (0.5, 1.0):
        expected = np.array(mx.softmax(model(mx.array([[2, 3]]))[0, -1] / temp))
        tokens = write(model, [[2, 3]] * 4000, 3, [temp] * 4000, (), (7,), batch_size=1000)
        found = np.bincount([t[0] for t in tokens], minlength=11) / 4000
        assert np.abs(found - expected).max() < 0.03
        assert np.abs(expected - 1 / 11).max() > 0.1


def test_digest_changes_with_the_weights():
    model = make_model()
    before = weights_digest(model)
    assert weights_digest(make_model()) == before
    model.layers[1].mlp.up_proj.weight = model.layers[1].mlp.up_proj.weight * 1.001
    assert weights_digest(model) != before
