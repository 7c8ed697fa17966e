"""`mlx-redrafter train` end to end: every head it can train, mistakes, kills, and several processes."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_redrafter.convert.target import convert_target
from support.commands import code_of

from mlx_redrafter.cli.main import main
from mlx_redrafter.drafting.kinds import open_drafter

SMALL = ["--rows", "50", "--held-out", "2", "--row-length", "40", "--prefix-length", "8", "--iters", "30"]


def train(stories, out, *flags):
    return code_of("train", "--model", str(stories), "--out", str(out), *SMALL, *flags)


@pytest.fixture(scope="module")
def text(stories, tmp_path_factory):
    """Rows that runs share."""
    out = tmp_path_factory.mktemp("text") / "drafter"
    assert train(stories, out, "--iters", "1") == 0
    return out / "training" / "text"


def generated(stories, draft, capsys, *flags):
    capsys.readouterr()
    command = ["generate", "--model", str(stories), "-p", "Once upon a time", "-m", "40", "--beam-width", "4", "--json"]
    assert main([*command, "--draft", str(draft), *flags]) == 0
    return json.loads(capsys.readouterr().out)


HEADS = {
    "usual": [],
    "reduced vocabulary": ["--draft-vocab-size", "200"],
    "tied": ["--output-layer", "tied"],
    "tied, reduced vocabulary": ["--output-layer", "tied", "--draft-vocab-size", "200"],
    "narrow": ["--exit-dim", "32", "--num-draft-layers", "1"],
    "Apple's": ["--exit-dim", "128", "--loss", "text", "--output-layer", "random"],
    "no recurrence, 8 bit": ["--no-rnn", "--q-bits", "8"],
    "4 bit, trained for it, reduced vocabulary, two layers": [
        *["--q-bits", "4", "--q-group-size", "32", "--q-aware", "--draft-vocab-size", "200"],
        *["--context-layers", "1", "3", "--output-norm"],
    ],
    "two layers, tied": ["--context-layers", "1", "2", "--output-layer", "tied"],
}


WHOLE_ROWS = ("--context-layers", "1", "2", "3", "--prefix-window", "16", "--prefix-layers", "2", "--output-norm",
    "--learn-prompts", "--loss-vocab", "64")  # fmt: skip
FAST = ("4 bit, trained for it, reduced vocabulary, two layers",)  # a tied one is in `test_a_quantised_target`


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in HEADS])
def test_every_head_learns_and_decodes_exactly(name, stories, text, tmp_path, capsys):
    """If this fails, a light head cannot be trained, kept or decoded with, or changes the text."""
    out = tmp_path / "drafter"
    flags = [*HEADS[name], *([] if "tied" in name else ["--output-layer", "target"])]
    assert train(stories, out, "--text", str(text), "--eval-every", "0", "--iters", "150", *flags) == 0
    drafter = open_drafter(out)
    drafted, plain = generated(stories, out, capsys), generated(stories, "none", capsys)
    assert drafted["method"] == "redrafter" and drafted["tokens"] == plain["tokens"]
    assert drafted["mean_acceptance_length"] > 1.1
    lines = [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    names = {key for key, _ in tree_flatten(drafter.parameters())}
    assert ("lm_head.weight" in names) == ("tied" not in name)
    assert len(drafter.context_layers) == (2 if "two layers" in name else 3)  # as the usual recipe has it
    if "vocabulary" in name:
        kept = np.array(drafter.vocab_map)
        assert len(kept) == 200 and (np.diff(kept) > 0).all()
        assert drafter.config.scored == 200


def test_what_a_run_leaves(stories, tmp_path, capsys):
    """If this fails, nobody can tell what a drafter is, or how to make it again."""
    out = tmp_path / "drafter"
    flags = ["--output-layer", "target", "--draft-vocab-size", "300", "--eval-every", "10", "--patience", "9"]
    assert train(stories, out, *flags) == 0
    printed = capsys.readouterr().out
    assert "mean acceptance length" in printed and "of the target's own reading speed" in printed
    result = json.loads((out / "training" / "result.json").read_text())
    card = (out / "README.md").read_text()
    assert f"{result['mean_acceptance_length']:.2f} (greedy" in card and "the 300 most frequent of 512 tokens" in card
    assert "--draft-vocab-size 300" in card and "--resume" not in card and card.startswith("---\nlibrary_name: mlx")
    assert result["mean_acceptance_length"] > 1.1 and 0.5 < result["coverage"] <= 1
    assert result["bytes_per_draft_step"] == open_drafter(out).bytes_per_draft_step() and "bfloat16" in card
    assert len([1 for line in (out / "training" / "log.jsonl").open() if "acceptance" in line]) == 3
    assert not list((out / "training").glob("readings*"))
    assert (out / "training" / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert open_drafter(out).lm_head.weight.dtype == mx.bfloat16
    assert train(stories, out) == 2
    assert "already exists: a run was begun there; add --resume" in capsys.readouterr().err
    assert train(stories, out, "--resume", "--draft-vocab-size", "200") == 2
    assert "--draft-vocab-size is 200, but the run to resume has 300" in capsys.readouterr().err


def test_a_run_knows_its_own_flags(stories, text, tmp_path, capsys):
    """If this fails, going on asks for every flag again, a finished run cannot be given more updates, or every kill
    costs the size of a checkpoint on the disk."""
    out = tmp_path / "drafter"
    flags = ["--text", str(text), "--eval-every", "0", "--seed", "3", "--exit-dim", "32"]
    assert train(stories, out, *flags, "--iters", "2") == 0
    first = weights(out)
    left = [out / "training" / ".4711.checkpoint.safetensors", out / ".4711.model.safetensors"]  # of killed processes
    others = [out / ".gitattributes", out / "training" / ".DS_Store"]
    for path in (*left, *others):
        path.write_bytes(b"x")
    capsys.readouterr()
    assert main(["train", "--out", str(out), "--resume", "--iters", "3", "--eval-every", "3", "--patience", "9"]) == 0
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)
    result = json.loads((out / "training" / "result.json").read_text())
    begun = json.loads((out / "training" / "arguments.json").read_text())
    assert (result["updates"], result["seed"], result["exit_dim"]) == (3, 3, 32) and weights(out) != first
    assert (begun["iters"], begun["seed"], begun["text"]) == (3, 3, [str(text)]) and "given" not in begun
    assert [json.loads(x)["iter"] for x in (out / "training" / "log.jsonl").open()] == [2, 3]
    assert main(["train", "--out", str(out), "--resume", "--seed", "4"]) == 2
    assert "--seed is 4, but the run to resume has 3; such a change needs a new --out" in capsys.readouterr().err


def test_a_data_error_blocks_nothing(stories, tmp_path, capsys):
    """If this fails, the corrected command is told that --out already exists."""
    out, data = tmp_path / "drafter", tmp_path / "a.jsonl"
    flags = ["--data", str(data), "--held-out", "1", "--row-length", "16", "--rows", "9", "--iters", "1"]
    data.write_text('{"text": "Once upon a time there was a cat. "}\n' * 40 + '{"words": "x"}\n')
    assert train(stories, out, *flags) == 2
    assert "a.jsonl line 41: found the fields words" in capsys.readouterr().err and not out.exists()
    data.write_text('{"text": "Once upon a time there was a cat. "}\n' * 40)
    out.mkdir()
    assert train(stories, out, *flags, "--eval-every", "0") == 0


def test_going_on_from_a_drafter(stories, text, tmp_path, capsys):
    """If this fails, more text means training from nothing."""
    flags = ["--text", str(text), "--eval-every", "0", "--dtype", "float32", "--warm-up", "0"]
    assert train(stories, tmp_path / "a", "--draft-vocab-size", "200", *flags, "--iters", "20") == 0
    assert train(stories, tmp_path / "b", "--init", str(tmp_path / "a"), *flags, "--iters", "1") == 0
    logs = [[json.loads(x) for x in (tmp_path / n / "training" / "log.jsonl").open()] for n in ("a", "b")]
    assert logs[1][0]["loss"] < logs[0][1]["loss"]
    assert open_drafter(tmp_path / "b").config.draft_vocab_size == 200
    assert train(stories, tmp_path / "c", "--init", str(tmp_path / "a"), "--exit-dim", "32") == 2
    assert "--exit-dim is 32, but --init" in capsys.readouterr().err


def test_a_quantised_target(stories, tmp_path, capsys):
    """If this fails, the models that people have cannot get a drafter."""
    small = tmp_path / "4bit"
    convert_target(str(stories), str(small), quantize=True, q_bits=4, q_group_size=32)
    out = tmp_path / "tied"  # its output layer is the target's, 4 bit
    flags = ["--rows", "24", "--held-out", "2", "--iters", "8", "--eval-every", "0"]
    assert train(small, out, "--output-layer", "tied", *flags) == 0
    drafted = generated(small, out, capsys)
    assert drafted["method"] == "redrafter" and drafted["tokens"] == generated(small, "none", capsys)["tokens"]
    lines = [json.loads(line) for line in (out / "training" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["iter"] == 8 and open_drafter(out).config.tie_output


MISTAKES = {
    "no numbers": (["--iters", "0"], "--iters is 0, expected 1 or more"),
    "no length of beams": (["--beam-length", "33"], "--beam-length is 33, expected 2 to 32"),
    "no learning": (["--learning-rate", "0"], "--learning-rate is 0, expected more than 0"),
    "a longer warm-up than run": (["--warm-up", "31"], "--warm-up is 31, expected 0 to 30, the updates"),
    "too many tokens": (["--draft-vocab-size", "600"], "--draft-vocab-size is 600, expected at most 512"),
    "tied to another width": (["--output-layer", "tied", "--exit-dim", "32"], "needs --exit-dim 64"),
    "layers that fall": (["--context-layers", "3", "1"], "--context-layers 3 1: expected rising numbers of layers"),
    "a layer too many": (
        ["--context-layers", "1", "4"],
        "--context-layers: layer 4 is to be read, but the target has 3",
    ),
    "layers for Medusa": (["--method", "medusa", "--context-layers", "1"], "does not apply to --method medusa"),
    "weights for other steps": (["--step-weights", "1", "2"], "expected 4 numbers, one per draft step"),
    "shares that rise": (["--step-shares", "1", "0.2", "0.5", "0.1"], "none above the one before it"),
    "patience without evaluations": (["--patience", "2", "--eval-every", "0"], "needs evaluations"),
    "rounding without bits": (["--q-aware"], "--q-aware needs --q-bits"),
    "rows beyond the context": (["--row-length", "1000"], "--row-length is 1000, expected at most"),
    "no such text": (["--text", "nowhere"], "nowhere/manifest.json: no such file"),
    "a batch that does not split": (
        ["--batch-size", "6", "--grad-accumulation", "4"],
        "--batch-size is 6, expected a multiple of 4",
    ),
    "nowhere to upload to": (["--upload-repo", "name"], "--upload-repo is 'name', expected owner/name"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, stories, tmp_path, capsys):
    """If this fails, a user's mistake costs an evening, or ends in a traceback."""
    flags, message = MISTAKES[name]
    assert train(stories, tmp_path / "out", *flags) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed
    assert not (tmp_path / "out").exists()  # nor has the target written any text


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def training(model, out, flags):
    """The command line of a training in a process of its own."""
    return [sys.executable, "-m", "mlx_redrafter.cli.main", "train", "--model", str(model), "--out", str(out), *flags]


def kill_until_done(stories, text, out, kills, seed, head=()):
    """Runs the command, killing it at random moments; returns how often it was killed in the middle."""
    rng, killed = random.Random(seed), 0
    flags = [*SMALL, "--iters", "40", "--save-every", "7", "--eval-every", "20", "--text", str(text), *head]
    command = training(stories, out, flags)
    for _ in range(200):
        resume = ["--resume"] if (out / "training" / "arguments.json").exists() else []
        process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if killed < kills:
            # The moment is counted from the first sign of life, for starting takes seconds on a busy machine.
            begun, log = time.time(), out / "training" / "log.jsonl"
            before = log.stat().st_mtime_ns if log.exists() else 0
            while process.poll() is None and time.time() - begun < 60:
                if log.exists() and log.stat().st_mtime_ns != before:
                    break
                time.sleep(0.01)
            time.sleep(rng.random() * 0.4)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                killed += 1
        errors = process.communicate()[1]
        if process.returncode == 0:
            return killed
        assert process.returncode == -signal.SIGKILL, errors
    raise AssertionError("the run never ended")


def check_killed(stories, text, tmp_path, kills, head=()):
    quiet, stopped = tmp_path / "quiet", tmp_path / "stopped"
    assert kill_until_done(stories, text, quiet, 0, 0, head) == 0
    assert kill_until_done(stories, text, stopped, kills, 1, head) >= min(kills, 1)
    assert weights(quiet) == weights(stopped)
    facts = [json.loads((folder / "training" / "result.json").read_text()) for folder in (quiet, stopped)]
    assert facts[0]["mean_acceptance_length"] == facts[1]["mean_acceptance_length"]
    assert not [p for folder in (quiet, stopped) for p in folder.rglob(".*")]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 20])
@pytest.mark.parametrize("head", [(), WHOLE_ROWS], ids=["as Apple's", "all layers and the prefix"])
def test_killed_runs_end_like_quiet_ones(stories, text, tmp_path, kills, head):
    """If this fails, a power cut costs the night's training, or changes what is learned."""
    check_killed(stories, text, tmp_path, kills, head)


def launch(stories, text, out, *flags):
    """The same training in two processes on this machine."""
    # mlx.launch starts each process in the current folder with this interpreter.
    launcher = pathlib.Path(sys.executable).parent / "mlx.launch"
    flags = [*SMALL, "--iters", "5", "--text", str(text), "--eval-every", "0", "--batch-size", "8", *flags]
    program = training(stories, out, flags)
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [str(launcher), "-n", "2", "--backend", "ring", "--", *program],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )


@pytest.mark.slow
def test_two_processes_learn_what_one_does(stories, text, tmp_path):
    """If this fails, training on two Macs learns something else than on one."""
    flags = ["--iters", "5", "--batch-size", "8", "--text", str(text), "--eval-every", "0"]
    assert train(stories, tmp_path / "one", *flags, "--dtype", "float32") == 0
    done = launch(stories, text, tmp_path / "two", "--dtype", "float32")
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = open_drafter(tmp_path / "one"), open_drafter(tmp_path / "two")
    for (name, a), (_, b) in zip(tree_flatten(one.parameters()), tree_flatten(two.parameters()), strict=True):
        assert mx.allclose(a, b, atol=2e-5), name
    logs = [[json.loads(x) for x in (tmp_path / n / "training" / "log.jsonl").open()] for n in ("one", "two")]
    assert logs[0][-1]["loss"] == pytest.approx(logs[1][-1]["loss"], rel=1e-5)
    assert logs[0][-1]["grad_norm"] == pytest.approx(logs[1][-1]["grad_norm"], rel=1e-4)
    assert logs[0][-1]["hits"] == pytest.approx(logs[1][-1]["hits"], rel=1e-5)
