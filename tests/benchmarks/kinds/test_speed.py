"""`mlx-redrafter bench speed`."""

import json

from support.bench import SHORT, bench


def test_speed(tmp_path, capsys):
    flags = ["--methods", "chain:2", "best-first:2x3:4", "--temps", "0", "1", "--cost-scale", "2", *SHORT]
    printed, data, text = bench(tmp_path, capsys, "speed", *flags)
    assert "cost scaled 1.98x" in data["facts"]["target"] and "--cost-scale 2.0" in data["command"]
    for at in data["temperatures"]:
        assert list(at["methods"]) == ["plain", "chain:2", "best-first:2x3:4"]
        assert list(at["limits"]) == ["chain:2", "best-first:2x3:4"]
        for name, method in at["methods"].items():
            # At a temperature this needs mlx_lm to draw with our noise.
            assert method["equal"] == method["runs"] == 2
            assert method["efficiency"] > 0 and (name == "plain") == (method["acceptance"] == 1)
        for limit in at["limits"].values():
            assert limit["speed_up"] > 0 and limit["reached"] > 0
    for heading in ("greedy", "temperature 1"):
        assert heading in printed and f"### {heading}" in text
    assert "| plain (mlx_lm) |" in text


def test_speed_by_category(tmp_path, capsys):
    file = tmp_path / "questions.jsonl"
    lines = [{"turns": [f"x{i} = {i}\n"], "category": c} for i, c in enumerate(["maths", "writing"])]
    file.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--methods", "ours", "--prompts", str(file), "-m", "6"]
    printed, data, _ = bench(tmp_path, capsys, "speed", *flags)
    assert data["categories"] == ["maths", "writing"]
    assert "median speed-up by category" in printed and data["temperatures"][0]["limits"] == {}
