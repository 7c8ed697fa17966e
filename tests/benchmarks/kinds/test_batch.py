"""`mlx-redrafter bench batch`."""

import pytest
from mlx_redrafter.benchmarks.kinds import batch
from support.bench import SHORT, bench

pytestmark = pytest.mark.usefixtures("drafting_pays")


def test_batch(tmp_path, capsys):
    """If this fails, what is measured is not three ways to the same texts."""
    flags = ["--batch-sizes", "3", "1", "--repeats", "1", *SHORT]
    printed, data, _ = bench(tmp_path, capsys, "batch", *flags)
    assert [one["texts"] for one in data["sizes"]] == [1, 3]
    for size in data["sizes"]:
        for name in batch.METHODS:
            for one in size["runs"][name]:
                assert one["equal"] == one["texts"] == 2 * size["texts"] and one["tokens"] == 20 * size["texts"]
                assert one["seconds"] > 0 and (one["acceptance"] > 1) == (name == batch.DRAFTED)
            assert len(size["runs"][name]) == 1
        assert size["ratios"]["mlx_lm"] == {"median": 1, "low": 1, "high": 1}
    assert "3 at once" in printed and "6/6" in printed


def test_texts_that_differ_are_not_equal(tmp_path, capsys, monkeypatch):
    """If this fails, a batch that writes other texts looks as though it wrote the same."""
    monkeypatch.setattr(batch, "_alone", lambda *_: [1, 2, 3])
    printed, _, _ = bench(tmp_path, capsys, "batch", "--batch-sizes", "1", "--repeats", "1", *SHORT)
    assert printed.count("0/2") == 3
