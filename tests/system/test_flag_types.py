"""Numbers in a range, as flags take them."""

import argparse

import pytest

from mlx_redrafter.system.flag_types import real, whole


def test_whole_numbers():
    assert whole(0)("7") == 7 and whole(1, 3)("3") == 3 and whole(1, also=(-1,))("-1") == -1
    for read, text, words in (
        (whole(1), "0", "is 0, expected 1 or more"),
        (whole(1, 3), "4", "is 4, expected 1 to 3"),
        (whole(1), "1.5", "is '1.5', expected a whole number, 1 or more"),
        (whole(1, also=(-1,), words="1, or -1"), "-2", "is -2, expected 1, or -1"),
    ):
        with pytest.raises(argparse.ArgumentTypeError) as refused:
            read(text)
        assert str(refused.value) == words


def test_real_numbers():
    assert real(0)("0.5") == 0.5 and real(0, 1)("1") == 1
    for read, text, words in (
        (real(0), "-1", "is -1, expected 0 or more"),
        (real(0, 1), "nan", "is nan, expected 0 to 1"),
        (real(0), "inf", "is inf, expected 0 or more"),
        (real(0), "x", "is 'x', expected a number, 0 or more"),
    ):
        with pytest.raises(argparse.ArgumentTypeError) as refused:
            read(text)
        assert str(refused.value) == words
