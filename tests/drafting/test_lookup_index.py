"""The text on the host: what is looked up there is what the device finds, and how long it has been right."""

import mlx.core as mx
import numpy as np
import pytest
from support import RANDOM, REPEATING, looked_up_by_hand

from mlx_redrafter.drafting.lookup import TextBuffer
from mlx_redrafter.drafting.lookup_index import TextIndex


def on_the_device(text, count):
    tokens, found = TextBuffer(mx.array([text])).continuation(count)
    return tokens[0].tolist() if found.item() else []


@pytest.mark.parametrize("lowest", [0, 1])
def test_host_and_device_find_what_followed(lowest):
    """If this fails, what is expected of lookups is not what they bring, or something else than what followed."""
    rng = np.random.default_rng(lowest)
    texts = [rng.integers(lowest, lowest + 3, rng.integers(1, 30)).tolist() for _ in range(200)]
    found = 0
    for text in [*texts, REPEATING, RANDOM, [1], [1, 1, 1], [lowest] * 9]:
        expected = looked_up_by_hand(text, 5)
        assert TextIndex(text).continuation(5) == expected == on_the_device(text, 5)
        found += bool(expected)
    assert 50 < found < len(texts)


@pytest.mark.parametrize("text", [[0, 5, 3, 0, 0], [0, 0], [7, 0, 0], [0], [0, 0, 1, 0, 0, 1, 0, 0]], ids=str)
def test_what_stands_before_the_text_matches_nothing(text):
    """If this fails, texts that end in token 0 are taken for repetitions of what was never written."""
    assert on_the_device(text, 4) == TextIndex(text).continuation(4) == looked_up_by_hand(text, 4)


def test_a_text_that_grows_is_the_whole_text():
    """If this fails, what was found depends on how many tokens a step brought."""
    rng = np.random.default_rng(4)
    text = rng.integers(0, 3, 120).tolist()
    grown, at = TextIndex(text[:1]), 1
    while at < len(text):
        step = int(rng.integers(1, 6))
        grown.extend(text[at : at + step])
        at += step
        assert grown.tokens == text[:at] and grown.continuation(6) == looked_up_by_hand(text[:at], 6)
    whole = TextIndex(text)
    assert (whole.tokens, whole.streak) == (grown.tokens, grown.streak)


def test_streaks():
    """If this fails, a text that repeats itself looks like one that does not."""
    assert TextIndex([]).streak == 0 and TextIndex([]).continuation(3) == []
    index, streaks = TextIndex([]), []
    for token in [*range(10), *range(10), 77, 78]:
        index.extend([token])
        streaks.append(index.streak)
    # Two tokens have to have been there before the third can be said.
    assert streaks == [0] * 12 + list(range(1, 9)) + [0, 0]
