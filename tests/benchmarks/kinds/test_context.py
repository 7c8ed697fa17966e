"""`mlx-redrafter bench context`."""

import pytest
from support.bench import bench


@pytest.mark.slow  # test_command.py runs this kind on a tiny target
def test_context(tmp_path, capsys):
    flags = ["--contexts", "64", "2100", "--capacities", "256", "512", "--methods", "plain", "chain:2"]
    _, data, _ = bench(tmp_path, capsys, "context", *flags, "-m", "12", "--repeats", "1")
    assert [(one["tokens"], one["method"]) for one in data["readings"]] == [
        (tokens, method) for tokens in (64, 2100) for method in ("plain", "chain:2")
    ]
    for one in data["readings"]:
        assert one["needed_bytes"] <= one["peak_bytes"] < 2.2 * one["needed_bytes"]
    assert [(one["method"], one["capacity"]) for one in data["capacities"]] == [
        (method, capacity) for method in ("plain", "chain:2") for capacity in (256, 512)
    ]
