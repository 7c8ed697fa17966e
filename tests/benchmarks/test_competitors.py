"""Names of methods, and the noise that they draw with."""

from mlx_redrafter.benchmarks.competitors import shape_named

from mlx_redrafter import DraftShape


def test_names_of_methods():
    assert shape_named("chain:5") == DraftShape(1, 6, 5)
    assert shape_named("beams:4x5:7") == DraftShape(4, 5, 7, "beams")
    assert shape_named("best-first:3x4") == DraftShape(3, 4, 9)
    assert shape_named("plain") is None and shape_named("ours") is None and shape_named("auto") is None
