"""`mlx-redrafter bench`: every kind measures, writes whole files, and refuses what it cannot do before it begins."""

import json
import types

import mlx.core as mx
import pytest
from mlx_redrafter.benchmarks import charts, stages
from mlx_redrafter.benchmarks.methods import shape_named
from mlx_redrafter.benchmarks.workload import bytes_per_row, long_text, roomy_cache

from mlx_redrafter import DraftShape, stream_generate
from mlx_redrafter.cli.main import main
from mlx_redrafter.target.probe import verifier_of

SHORT = ["--num-prompts", "2", "--prompt-tokens", "24", "-m", "10"]


def bench(tmp_path, capsys, kind, *flags):
    """What a kind printed, and its JSON and Markdown; its chart is a PNG."""
    out = tmp_path / "out"
    assert main(["bench", kind, *flags, "--out", str(out)]) == 0
    assert (out / f"{kind}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(path.name for path in out.iterdir()) == [f"{kind}.{s}" for s in ("json", "md", "png")]
    data, text = json.loads((out / f"{kind}.json").read_text()), (out / f"{kind}.md").read_text()
    assert data["command"].startswith(f"mlx-redrafter bench {kind} ") and data["command"] in text
    assert data["facts"]["device"] and "float32" in data["facts"]["target"]
    return capsys.readouterr().out, data, text


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


def test_sweep(tmp_path, capsys):
    flags = ["--widths", "1", "2", "--lengths", "3", "--nodes", "4", "3", *SHORT]
    printed, data, _ = bench(tmp_path, capsys, "sweep", *flags)
    names = {one["name"]: one for one in data["settings"]}
    grid = {"chain:2", "best-first:2x3:3", "best-first:2x3:4"}
    policies = {f"{policy}:4x5:{n}" for policy in ("beams", "best-first") for n in (3, 4)} | {"chain:3", "chain:4"}
    assert set(names) == grid | policies
    assert all(one["equal"] == one["runs"] == 2 for one in names.values())
    assert data["best"] == max(names, key=lambda name: names[name]["speed_up"]["median"])
    assert (
        "mean acceptance length at equal rows" in printed and "equal to mlx_lm's, token for token: 22 of 22" in printed
    )
    assert set(data["auto"]) == {"auto", "auto-no-lookup"}
    assert "auto-no-lookup: " in printed and "of the best setting's tokens per second" in printed


def test_verify_cost(tmp_path, capsys):
    flags = ["--rows", "4", "--contexts", "16", "40", "--cost-scale", "2", "1", "--repeats", "1"]
    _, data, _ = bench(tmp_path, capsys, "verify-cost", *flags)
    found = [(round(one["cost_scale"], 1), one["context"], one["rows"]) for one in data["measured"]]
    assert found == [(scale, context, rows) for scale in (1, 2) for context in (16, 40) for rows in (1, 4)]
    assert all(0 < one["seconds"]["low"] <= one["seconds"]["median"] for one in data["measured"])


def test_breakdown(tmp_path, capsys):
    _, data, _ = bench(tmp_path, capsys, "breakdown", "--methods", "best-first:2x3:4", *SHORT)
    [times] = data["seconds_per_step"].values()
    for part in ("draft", "verify", "accept and commit"):
        assert times[f"{part}, built"]["median"] > 0 and times[f"{part}, run"]["median"] > 0
    assert times["whole step"]["median"] > 0 and times["device alone"]["median"] > 0


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


@pytest.mark.parametrize(
    "argv, message",
    [
        (["speed", "--methods", "magic"], "--methods magic: no such method, expected one of plain, plain-packed, ours"),
        (["speed", "--methods", "chain:x"], "--methods chain:x: expected chain:N"),
        (["speed", "--methods", "beams:4"], "--methods beams:4: expected beams:WxL:N"),
        (["speed", "--methods", "best-first:2x3:9"], "best-first:2x3:9: --num-draft-tokens is 9, expected 1 to 4"),
        (["speed", "--temps", "-1"], "--temps is -1"),
        (["speed", "--repeats", "0"], "--repeats is 0"),
        (["speed", "-m", "1"], "--max-tokens is 1, expected 2 or more"),
        (["speed", "--num-prompts", "0"], "--num-prompts is 0"),
        (["speed", "--prompts", "/no/such"], "--prompts /no/such: no such file"),
        (["speed", "--model", "x"], "--prompts is missing"),
        (["speed", "--out", __file__], "is a file, expected a directory"),
        (["speed", "--out", "/proc/nope/x"], "--out /proc/nope/x: cannot be written"),
        (["speed", "--cost-scale", "0.5"], "--cost-scale is 0.5, expected 1 to 1000"),
        (["speed", "--cost-scale", "nan"], "--cost-scale is nan"),
        (["speed", "--draft", "none"], "--draft is missing"),
        (["speed", "-m", "3000"], "exceeds the target's context of 2048; --prompt-tokens cuts prompts"),
        (["sweep", "--widths", "0"], "--widths is 0"),
        (["sweep", "--widths", "99"], "--widths is 99"),
        (["sweep", "--lengths", "1"], "--lengths is 1"),
        (["sweep", "--nodes", "0"], "--nodes is 0"),
        (["verify-cost", "--rows", "0"], "--rows is 0"),
        (["verify-cost", "--contexts", "0"], "--contexts is 0"),
        (["verify-cost", "--cost-scale", "1", "-3"], "--cost-scale is -3"),
        (["breakdown", "--methods", "plain"], "--methods plain: has no fixed shape of drafts"),
        (["context", "--contexts", "1"], "--contexts is 1"),
        (["context", "--capacities", "100"], "--capacities is 100, expected 608 to"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes(capsys, argv, message, tmp_path, monkeypatch):
    """If this fails, minutes are spent before a mistake shows, or it ends in a traceback."""
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *argv, "--out", "results"] if "--out" not in argv else ["bench", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mlx-redrafter: error: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(charts.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "speed", "--out", str(tmp_path / "x")]) == 2
    assert "--out needs matplotlib for its charts: pip install 'mlx-redrafter[bench]'" in capsys.readouterr().err


def test_names_of_methods():
    assert shape_named("chain:5") == DraftShape(1, 6, 5)
    assert shape_named("beams:4x5:7") == DraftShape(4, 5, 7, "beams")
    assert shape_named("best-first:3x4") == DraftShape(3, 4, 9)
    assert shape_named("plain") is None and shape_named("ours") is None and shape_named("auto") is None


@pytest.mark.parametrize("walk", [stages.stages, stages.device_times])
def test_taken_apart_a_step_writes_the_same_text(pair, prefixes, walk):
    """If this fails, the parts that are timed are not those of the real step."""
    model, drafter, tokenizer = pair
    shape = DraftShape(4, 5, 7)
    step, committed = stages.begin(verifier_of(model), drafter, shape, prefixes[0])
    first = step.root.item()
    walk(step, committed, 12)
    made = step.cache.length.item() - committed
    texts = stream_generate(model, tokenizer, prefixes[0], drafter, shape=shape, max_tokens=made + 1)
    tokens = [response.token for response in texts]
    assert made >= 12 and (tokens[0], tokens[-1]) == (first, step.root.item())
    assert len(stages.stages(step, committed + made, 2)) == 2


def test_rows_cost_more_than_none(pair, prefixes):
    """Behind one context and without a commit: the rows are the only thing that changes."""
    rows = stages.Rows(verifier_of(pair[0]), prefixes[0])
    times = {count: min(rows.seconds(count, calls=2) for _ in range(4)) for count in (1, 32)}
    assert 0 < times[1] < times[32]
    assert rows.cache.length.item() == len(prefixes[0])


def test_a_step_ends_where_the_next_begins(monkeypatch):
    clock = iter([10.0, 13.0, 14.0])
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(clock))
    responses = [types.SimpleNamespace(steps=steps) for steps in (0, 1, 1, 1, 2, 3, 3)]
    assert stages.step_times(responses) == [3.0, 1.0]


def test_long_contexts(pair):
    model, _, tokenizer = pair
    text = long_text(tokenizer, 3000)
    assert len(text) == 3000 and len(set(text)) > 100
    caches = roomy_cache(model, 700)
    assert all(cache.offset == 0 and cache.keys.shape[2] == 700 for cache in caches)
    model(mx.array([text[:600]]), cache=caches)
    assert all(cache.offset == 600 and cache.keys.shape[2] == 700 for cache in caches)
    assert bytes_per_row(model) == 7 * 2 * 2 * 64 * 4
