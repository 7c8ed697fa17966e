"""`mlx-redrafter bench verify-cost`."""

from support.bench import bench


def test_verify_cost(tmp_path, capsys):
    flags = ["--verify-rows", "4", "--contexts", "16", "40", "--cost-scales", "2", "1", "--repeats", "1"]
    _, data, text = bench(tmp_path, capsys, "verify-cost", *flags)
    found = [(round(one["cost_scale"], 1), one["context"], one["rows"]) for one in data["measured"]]
    assert found == [(scale, context, rows) for scale in (1, 2) for context in (16, 40) for rows in (1, 4)]
    medians = [one["seconds"]["median"] for one in data["measured"]]
    cells = [line.replace("|", "").split() for line in text.splitlines() if line.startswith(("| 1 |", "| 4 |"))]
    for column, (one, four) in enumerate(zip(medians[::2], medians[1::2])):
        ones, fours = (line[1 + 2 * column : 3 + 2 * column] for line in cells)
        assert ones == [f"{1e3 * one:.2f}", "1.00"] and fours == [f"{1e3 * four:.2f}", f"{four / one:.2f}"]
