"""`mlx-redrafter bench speed`."""

import json

from mlx_redrafter.benchmarks.compare import Run, summarize
from mlx_redrafter.benchmarks.kinds.speed import Limit, _limit
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
            assert (name == "plain") == (method["acceptance"] == 1)
            assert min(method["speed_ups"]) <= method["speed_up"]["low"] <= method["speed_up"]["median"]
        assert at["methods"]["plain"]["speed_ups"] == [1, 1] and at["methods"]["plain"]["efficiency"] == 1
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


def test_the_limit_is_a_step_of_its_rows_alone():
    """If this fails, the table says that more, or less, is to be had than what is."""
    nine = list(range(9))
    # Plain takes 1 s a token; drafted 0.5 s and 0.25 s, with 2 and 4 tokens a step whose rows alone take 0.5 s.
    runs = {"plain": [[Run(nine, 8.0, 8)]] * 2, "chain:3": [[Run(nine, 4.0, 4)], [Run(nine, 2.0, 2)]]}
    summary = summarize(runs)["chain:3"]
    assert _limit(runs, "chain:3", summary, [0.5, 0.5]) == Limit((4 + 8) / 2, (2 / 4 + 4 / 8) / 2)
