"""Every mistake is one line that names the thing, and exit code 2."""

import argparse
import json
import shutil
import subprocess
import sys
from unittest.mock import create_autospec

import mlx.core as mx
import pytest
from support import make_drafter

import mlx_redrafter
from mlx_redrafter.cli import inspect
from mlx_redrafter.cli.main import main, parser_of_all
from mlx_redrafter.errors import UserError
from mlx_redrafter.text.loading import EMBEDDED


@pytest.fixture
def target(tmp_path):
    """A copy of the embedded target to damage; its weights are a link until somebody writes them."""
    folder = tmp_path / "target"
    shutil.copytree(EMBEDDED / "target", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.safetensors").symlink_to(EMBEDDED / "target" / "model.safetensors")
    return folder


def edit(folder, **changes):
    file = folder / "config.json"
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


def truncate(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole[: len(whole) // 2])


def refused(capsys, *argv):
    """The one line of an error."""
    try:
        code = main(list(argv))
    except SystemExit as stopped:  # of a flag that argparse refuses
        code = stopped.code
    assert code == 2
    err = capsys.readouterr().err
    assert err.startswith("mlx-redrafter: error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: (t / "model.safetensors").unlink(), "no model*.safetensors file"),
        (truncate, "model.safetensors: truncated, "),
        (lambda t: (t / "config.json").unlink(), "config.json: no such file"),
        (lambda t: (t / "config.json").write_text("[1]"), "found a JSON list, expected an object"),
        (lambda t: edit(t, model_type=None), "key 'model_type' is missing"),
        (lambda t: edit(t, hidden_size=None), "hidden_size"),
        (lambda t: edit(t, model_type="never-heard-of"), "never-heard-of"),
        (lambda t: edit(t, intermediate_size=512), "mlx-lm cannot load it"),
        (lambda t: edit(t, num_attention_heads=0), "mlx-lm cannot load it"),
        (lambda t: edit(t, max_position_embeddings="abc"), "mlx-lm cannot load it"),
        (
            lambda t: (t / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
            "model-2.safetensors: no such file, though model.safetensors.index.json names it",
        ),
    ],
)
def test_damaged_targets(target, capsys, damage, message):
    damage(target)
    assert message in refused(capsys, "generate", "--model", str(target), "-p", "x")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden": 64}, "hidden_size is 64, but the target's is 384"),
        ({"vocab": 100, "hidden": 384}, "vocab_size is 100, but the target's is 4096"),
    ],
)
def test_drafters_of_other_models(tmp_path, capsys, changes, message):
    make_drafter(**changes).save(tmp_path / "d")
    assert message in refused(capsys, "generate", "--draft", str(tmp_path / "d"), "-p", "x")


def test_damaged_drafters(tmp_path, capsys):
    make_drafter(vocab=4096, hidden=384).save(tmp_path)
    truncate(tmp_path)
    assert "model.safetensors: truncated" in refused(capsys, "generate", "--draft", str(tmp_path), "-p", "x")
    edit(tmp_path, exit_dim=None)
    assert "key 'exit_dim' is missing" in refused(capsys, "generate", "--draft", str(tmp_path), "-p", "x")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["generate", "-p", ""], "--prompt is empty"),
        (["generate", "-p", "x", "--model", "/no/such/place"], "--model /no/such/place: no such directory"),
        (["generate", "-p", "x", "--draft", "no-such-place"], "--draft no-such-place: no such directory"),
        (["generate", "-p", "x", "--model", __file__], "is a file, expected a directory"),
        (["generate", "-p", "x", "--adapter-path", "/no/such"], "--adapter-path /no/such: no such directory"),
        (["generate", "-p", "x", "--beam-width", "0"], "--beam-width is 0"),
        (["generate", "-p", "x", "--beam-width", "65"], "--beam-width is 65"),
        (["generate", "-p", "x", "--beam-length", "1"], "--beam-length is 1"),
        (["generate", "-p", "x", "--num-draft-tokens", "4"], "--num-draft-tokens is 4, expected 1 to 3"),
        (
            ["generate", "-p", "x", "--beam-width", "4", "--num-draft-tokens", "17"],
            "--num-draft-tokens is 17, expected 1 to 16",
        ),
        (["generate", "-p", "x", "--num-draft-tokens", "0"], "--num-draft-tokens is 0"),
        (["generate", "-p", "x", "--max-tokens", "0"], "--max-tokens is 0"),
        (["generate", "-p", "x", "--temp", "-1"], "--temp is -1"),
        (["generate", "-p", "x", "--top-p", "2", "--temp", "1"], "--top-p is 2"),
        (["generate", "-p", "x = 1\n" * 1500], "expected fewer than the model's context of 2048"),
        (["generate", "-p", "x", "--system-prompt", "y"], "--system-prompt needs a chat template"),
        (["chat", "--beam-width", "-1"], "--beam-width is -1"),
        (["demo", "--draft", "none"], "--draft is missing"),
        (["demo", "--num-prompts", "0"], "--num-prompts is 0, expected 1 or more"),
        (["train", "--out", __file__], "already exists"),
        (["train", "--out", "x", "--rows", "0"], "--rows is 0, expected 17 or more"),
        (["train", "--out", "x", "--resume"], "--resume: "),
        (["train", "--out", "x", "--q-bits", "7"], "--q-bits is 7"),
        (["train", "--out", "x", "--q-bits", "4", "--exit-dim", "100"], "does not divide the drafter's exit_dim 100"),
        (["train", "--out", "x", "--seed", "-1"], "--seed is -1"),
        (["train", "--out", "x", "--cache-gb", "nan"], "--cache-gb is nan"),
        (["train", "--out", "x", "--temps", "inf"], "--temps inf"),
        (
            ["train", "--out", "x", "--row-length", "5000"],
            "--row-length is 5000, expected at most the target's context of 2048",
        ),
        (["train", "--out", "x", "--teacher-top-k", "5000"], "--teacher-top-k is 5000"),
        (["train", "--out", "x", "--beam-length", "40"], "--beam-length is 40, expected 2 to 32"),
        (["generate", "-p", "\udcff"], "the prompt is not valid UTF-8"),
        (["generate", "-p", "x", "--model", "foo/bar--baz"], "--model foo/bar--baz"),
        (["generate", "-p", "x", "--model", "~nosuchuser/x"], "--model ~nosuchuser/x: not a usable path"),
        (["generate", "-p", "x", "--model", "x" * 300], "not a usable path"),
        (["generate", "-p", "x", "--prompt-cache-file", "/tmp"], "/tmp: not a file"),
        (["generate", "-p", "x", "--kv-bits", "8", "--quantized-kv-start", "-5"], "--quantized-kv-start is -5"),
        (["chat", "--prompt-cache-file", "talk"], "expected a name that ends in .safetensors"),
        (["chat", "--prompt-cache-file", "/proc/nope/x.safetensors"], "its directory cannot be written"),
        (["convert", "drafter", "--hf-path", "/no/such", "--mlx-path", "y"], "--hf-path /no/such: no such directory"),
        (["convert", "target", "--hf-path", "/no/such", "--mlx-path", "y"], "--hf-path /no/such: no such directory"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes(capsys, argv, message, tmp_path, monkeypatch):
    """If this fails, a user's mistake ends in a traceback, or says nothing of what is wrong."""
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["generate", "-p", "x", "--bogus"], "unrecognized arguments: --bogus"),
        (["generate"], "--prompt"),
        (["chat", "--kv-bits", "3"], "argument --kv-bits: invalid choice"),
        (["generate", "-p", "x", "--temp", "warm"], "--temp is 'warm', expected a number, 0 or more"),
        (["convert", "drafter", "--hf-path", "x"], "--mlx-path"),
        (
            ["generate", "-p", "x", "-m", "0"],
            "--max-tokens is 0, expected 1 or more, or -1 for no limit (`mlx-redrafter",
        ),
        (["chat", "--top-p", "1.5"], "--top-p is 1.5, expected 0 to 1"),
        (["chat", "--min-p", "nan"], "--min-p is nan, expected 0 to 1"),
        (["chat", "--top-k", "2.5"], "--top-k is '2.5', expected a whole number, 0 or more"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "COMMAND"),
    ],
)
def test_flags_that_are_none(capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and message in err and err.count("\n") == 1


def test_a_template_that_fails(target, capsys):
    (target / "chat_template.jinja").write_text("{{ raise_exception('only users may speak') }}")
    line = refused(capsys, "generate", "--model", str(target), "-p", "x")
    assert "the tokenizer's chat template: only users may speak" in line


def test_the_program_as_installed():
    """If this fails, the console script is not what the README says."""
    command = [
        sys.executable,
        "-m",
        "mlx_redrafter.cli.main",
        "generate",
        "-p",
        "import os\n",
        "-m",
        "4",
        "--beam-width",
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert subprocess.run([sys.executable, "-m", "mlx_redrafter.cli.main", "-h"], capture_output=True).returncode == 0


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"mlx-redrafter {mlx_redrafter.__version__}\n"


@pytest.mark.parametrize("flags", [["--json"], []], ids=["json", "text"])
def test_a_full_disk_behind_the_output(flags):
    """If this fails, a script whose disk is full reads a traceback, and an exit code that means something else."""
    command = [sys.executable, "-m", "mlx_redrafter.cli.main", "generate", "--model", "embedded", "-p", "x", "-m", "2"]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, "--draft", "none", *flags], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "mlx-redrafter: error: output: No space left on device\n")


@pytest.mark.parametrize("error, line", [
    (PermissionError(13, "Permission denied", "/a/config.json"), "/a/config.json: Permission denied"),
    (UserError("yours"), "yours"),
])  # fmt: skip
def test_errors_of_files_are_one_line(capsys, monkeypatch, error, line):
    monkeypatch.setattr("mlx_redrafter.cli.inspect.run", create_autospec(inspect.run, side_effect=error))
    assert main(["inspect", "x"]) == 2
    assert capsys.readouterr().err == f"mlx-redrafter: error: {line}\n"


def every_parser(parser, name=()):
    """All commands, and the parsers of their flags."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield " ".join(name), parser
    for action in below:
        for word, child in action.choices.items():
            yield from every_parser(child, (*name, word))


GENERATING = ["generate", "chat", "demo", "tune", "doctor"]


@pytest.mark.parametrize("command", GENERATING)
def test_every_flag_is_explained(command):
    """If this fails, -h shows a flag and says nothing of it; flags are told what to do: verb, object."""
    parser = dict(every_parser(parser_of_all()))[command]
    for action in parser._actions:
        assert action.help, action.option_strings
        assert action.help[0].islower() and not action.help.rstrip().endswith("."), action.help


def test_demo(capsys):
    """If this fails, the first thing a newcomer types does not work, or the two texts differ."""
    assert main(["demo", "--embedded", "--num-prompts", "2", "-m", "24"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Model: embedded\n") and "plain (mlx_lm): held-out Python" in out
    assert "Texts equal to the plain one, token for token: 8 of 8" in out
    lines = [line for line in out.splitlines() if line.endswith("x")]
    assert [line.partition("  ")[0] for line in lines] == [
        "plain (mlx_lm)", "plain (our loop)", "drafted, chain of 3", "drafted, tree of 7", "drafter and lookup, auto",
    ]  # fmt: skip
    assert lines[0].endswith("1.00x")
    assert mx.default_device().type != mx.DeviceType.cpu or "Device: CPU" in out
