"""`mlx-redrafter bench verify-cost`."""

from support.bench import bench


def test_verify_cost(tmp_path, capsys):
    flags = ["--verify-rows", "4", "--contexts", "16", "40", "--cost-scales", "2", "1", "--repeats", "1"]
    _, data, _ = bench(tmp_path, capsys, "verify-cost", *flags)
    found = [(round(one["cost_scale"], 1), one["context"], one["rows"]) for one in data["measured"]]
    assert found == [(scale, context, rows) for scale in (1, 2) for context in (16, 40) for rows in (1, 4)]
    assert all(0 < one["seconds"]["low"] <= one["seconds"]["median"] for one in data["measured"])
