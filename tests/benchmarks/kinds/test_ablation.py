"""`mlx-redrafter bench ablation`: variants are really trained, differ in what they say, and are not trained twice."""

import json

import pytest
from mlx_redrafter.benchmarks.kinds.ablation import VARIANTS
from support.bench import refused

from mlx_redrafter.cli.main import main
from mlx_redrafter.drafting.kinds import open_drafter

CHOSEN = ("no recurrence", "vocabulary 1024", "4 bit")


def ablation(work, out, *flags):
    small = ["--rows", "32", "--iters", "2", "--num-prompts", "1", "--prompt-tokens", "24", "-m", "8"]
    return main(["bench", "ablation", "--work", str(work), "--out", str(out), *small, *flags])


@pytest.mark.slow
def test_variants_differ_in_one_thing_each(tmp_path, capsys):
    """If this fails, the table of what each choice is worth compares drafters that are not what it calls them."""
    work = tmp_path / "work"
    assert ablation(work, tmp_path / "out", "--only", *CHOSEN) == 0
    data = json.loads((tmp_path / "out" / "ablation.json").read_text())
    rows, plain = {row["variant"]: row for row in data["variants"]}, data["plain_tokens_per_second"]
    assert list(rows) == ["base", *CHOSEN]
    for row in rows.values():  # of one text, written once
        assert row["equal"] == row["runs"] == 1
        assert row["speed_up"] == pytest.approx(row["tokens_per_second"] / plain)
    assert all(row["acceptance_tree"] >= 1 and row["acceptance_chain"] >= 1 for row in rows.values())
    base = open_drafter(work / "base").config
    assert (base.rnn, base.draft_vocab_size) == (True, None)
    assert not open_drafter(work / "no-recurrence").config.rnn
    reduced = open_drafter(work / "vocabulary-1024")
    assert reduced.config.draft_vocab_size == 1024
    size = {name: row["bytes_per_draft_step"] for name, row in rows.items()}
    assert size["base"] - size["vocabulary 1024"] == (base.vocab_size - 1024) * base.exit_dim * 4
    assert size["4 bit"] < size["base"] / 6
    capsys.readouterr()

    written = {path: path.stat().st_mtime_ns for path in work.glob("*/model.safetensors")}
    assert len(written) == 3
    assert ablation(work, tmp_path / "again", "--only", "4 bit") == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert "texts equal to mlx_lm's, token for token: 2 of 2" in capsys.readouterr().out


def test_an_unknown_variant_is_named_before_anything_is_done(tmp_path, capsys):
    assert ablation(tmp_path / "work", tmp_path / "out", "--only", "no brain") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "--only no brain" in message and VARIANTS[1].name in message
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("flag, value, least", [("--rows", "31", 32), ("--iters", "0", 1)])
def test_too_little_is_refused(tmp_path, capsys, flag, value, least):
    printed = refused(capsys, "ablation", "--work", tmp_path, flag, value)
    assert f"{flag} is {value}, expected {least} or more" in printed
