"""What "equal to plain" means."""

import pytest

from mlx_redrafter.text.equality import compare_texts, first_difference


@pytest.mark.parametrize(
    ("other", "at"),
    [([1, 2, 3], None), ((1, 2, 3), None), ([9, 2, 3], 0), ([1, 2, 4], 2), ([1, 2], 2), ([1, 2, 3, 4], 3), ([], 0)],
)
def test_first_difference(other, at):
    """If this fails, a text that is cut short or goes on counts as equal, or as different too early."""
    assert first_difference([1, 2, 3], other) == at


def test_compare_texts():
    found = compare_texts([([1, 2, 3], [1, 2, 3]), ([1, 2, 3], [1, 5, 3]), ([4], [4, 4])])
    assert vars(found) == {"texts": 3, "equal": 1, "tokens": 7, "before": 5}
    assert str(found) == "1 of 3"
