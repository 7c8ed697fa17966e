"""`mlx-redrafter bench` refuses what it cannot do before it begins, in one line."""

import json

import mlx.core as mx
import pytest
from mlx_redrafter.benchmarks import charts
from support.bench import refused
from support.hybrids import write_pair

from mlx_redrafter.cli.main import main


@pytest.mark.parametrize(
    "argv, message",
    [
        (["speed", "--methods", "magic"], "--methods magic: no such method, expected one of plain, as-loaded, ours"),
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
        (["verify-cost", "--verify-rows", "0"], "--verify-rows is 0"),
        (["verify-cost", "--contexts", "0"], "--contexts is 0"),
        (["verify-cost", "--cost-scales", "1", "-3"], "--cost-scales is -3"),
        (["breakdown", "--methods", "plain"], "--methods plain: has no fixed shape of drafts"),
        (["context", "--contexts", "1"], "--contexts is 1"),
        (["context", "--capacities", "100"], "--capacities is 100, expected 608 to"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes(capsys, argv, message, tmp_path, monkeypatch):
    """If this fails, minutes are spent before a mistake shows, or it ends in a traceback."""
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *argv, *([] if "--out" in argv else ["--out", "results"]))
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(charts.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "speed", "--out", str(tmp_path / "x")]) == 2
    assert "--out needs matplotlib for its charts: pip install 'mlx-redrafter[bench]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """The flags of a target with recurrent states beside attention, and of its drafter."""
    folder = tmp_path_factory.mktemp("hybrid")
    (folder / "prompt.txt").write_text("import os\nimport sys\n\ndef f(")
    mx.disable_compile()  # on a CPU it calls a compiler for every new shape
    with pytest.MonkeyPatch.context() as patch:
        yield write_pair("qwen3_next", folder, patch), ["--prompts", str(folder / "prompt.txt"), "-m", "6"]
    mx.enable_compile()


ON_A_HYBRID = {
    "speed": ["--methods", "ours", "chain:2", "best-first:2x3:4", "auto"],
    "compare": ["--temps", "0", "0.7"],
    "sweep": ["--widths", "1", "2", "--lengths", "3", "--nodes", "3"],
    "breakdown": ["--methods", "chain:2"],
    "context": ["--contexts", "24", "--capacities", "96", "128", "--methods", "plain", "ours", "chain:2", "-m", "8"],
    "verify-cost": ["--verify-rows", "1", "3", "--contexts", "16", "--repeats", "1"],
}


@pytest.mark.parametrize("kind", ON_A_HYBRID)
def test_a_target_with_recurrent_states(kind, hybrid, tmp_path, capsys):
    """If this fails, a kind of benchmark is a traceback, or another text, on a hybrid target."""
    pair, texts = hybrid
    own = {"context": pair, "verify-cost": pair[:2]}.get(kind, [*pair, *texts])
    assert main(["bench", kind, *own, *ON_A_HYBRID[kind], "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / f"{kind}.json").read_text())
    if kind in ("speed", "compare", "sweep"):
        found = data.get("rows") or data.get("settings") or [*data["temperatures"][0]["methods"].values()]
        assert found and all(one["equal"] == one["runs"] for one in found)
    if kind == "context":
        assert [one["method"] for one in data["readings"]] == ["plain", "ours", "chain:2"]
        assert all(one["needed_bytes"] <= one["peak_bytes"] for one in data["readings"])
        assert [(one["method"], one["capacity"]) for one in data["capacities"]] == [
            (method, capacity) for method in ("plain", "ours", "chain:2") for capacity in (96, 128)
        ]
        assert len({one["needed_bytes"] for one in data["readings"]}) == 1
