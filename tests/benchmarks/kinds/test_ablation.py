"""`mlx-redrafter bench ablation`: recipes are really trained, on shared readings, and not twice."""

import json

import pytest
from support import DATA
from support.bench import refused
from support.commands import code_of

from mlx_redrafter.drafting.kinds import open_drafter

OWN = "mine=--loss lk --num-draft-layers 0 --context-layers 1 3"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    out = tmp_path_factory.mktemp("text") / "drafter"
    flags = ["--rows", "40", "--held-out", "2", "--row-length", "40", "--prefix-length", "8", "--iters", "1"]
    assert code_of("train", "--model", str(DATA / "tiny"), "--out", str(out), *flags, "--eval-every", "0") == 0
    return out / "training" / "text"


def ablation(work, text, out, *flags):
    prompts = work.parent / "prompts.jsonl"
    prompts.write_text('{"prompt": "Once upon a time"}\n{"prompt": "There was"}\n')
    small = ["--minutes", "0.02", "--prompts", str(prompts), "-m", "16", "--train-flags", "--draft-vocab-size 200"]
    where = ["--work", str(work), "--text", str(text), "--out", str(out)]
    return code_of("bench", "ablation", "--model", str(DATA / "tiny"), *where, *small, *flags)


@pytest.mark.parametrize(
    "names", [["medusa", "eagle", OWN], pytest.param(["old", "norm", "tied", OWN], marks=pytest.mark.slow)]
)
def test_recipes_differ_in_what_they_say(names, tmp_path, text, capsys):
    """If this fails, the table of what each choice is worth compares drafters that are not what it calls them."""
    work, out = tmp_path / "work", tmp_path / "out"
    assert ablation(work, text, out, "--recipes", *names) == 0
    rows = {row["recipe"]: row for row in json.loads((out / "ablation.json").read_text())["recipes"]}
    assert list(rows) == [*names[:-1], "mine"]
    for row in rows.values():
        assert all(length >= 1 for length in row["acceptance"]) and row["updates"] > 0 and row["draft_step_ms"] >= 0
    of = {name: open_drafter(work / name).config for name in rows}
    assert of["mine"].num_draft_layers == 0 and of["mine"].context_layers == (1, 3) and of["mine"].scored == 200
    assert "| mine | --loss lk --num-draft-layers 0" in (out / "ablation.md").read_text()
    if "medusa" in of:
        assert of["medusa"].scored == 512 and of["eagle"].scored == 200
        assert of["eagle"].tie_output and of["eagle"].unit_contexts and of["eagle"].context_layers == (1, 2, 3)
    else:
        old, norm = of["old"], of["norm"]
        assert (old.context_layers, old.prefix_window, old.output_norm, old.draft_vocab_size) == ((), 0, False, 200)
        assert (norm.context_layers, norm.prefix_window, norm.output_norm) == ((1, 2, 3), 256, True)
        assert of["tied"].tie_output
    assert not list(work.glob("*/checkpoint.safetensors"))
    capsys.readouterr()

    written = {path: path.stat().st_mtime_ns for path in work.glob("*/model.safetensors")}
    (work / "mine" / "result.json").unlink()  # as if it had been stopped
    assert ablation(work, text, tmp_path / "again", "--recipes", *names[-2:]) == 0
    printed = capsys.readouterr().out
    assert printed.count("trained already") == 1
    assert [path.parent.name for path, time in written.items() if path.stat().st_mtime_ns != time] == ["mine"]
    assert ablation(work, text, tmp_path / "again", "--recipes", names[0], "--minutes", "1") == 2
    assert "was trained with other flags" in capsys.readouterr().err


@pytest.mark.parametrize(
    "recipe, message",
    [
        ("no brain", "--recipes no brain: expected some of old, layers"),
        ("mine=--brain 3", "recipe mine: `mlx-redrafter train` has no --brain"),
        ("mine=--loss text", "expected the target's most probable tokens"),
        ("mine=--context-layers 9", "layer 9 is to be read, but the target has 3"),
    ],
)
def test_mistakes(tmp_path, text, capsys, recipe, message):
    """If this fails, a mistyped recipe costs the minutes of those before it."""
    assert ablation(tmp_path / "work", text, tmp_path / "out", "--recipes", "old", recipe) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not (tmp_path / "work").exists()


def test_too_little_is_refused(tmp_path, capsys):
    printed = refused(capsys, "ablation", "--work", tmp_path, "--text", tmp_path, "--rows", "0")
    assert "--rows is 0, expected 1 or more" in printed
