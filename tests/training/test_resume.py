"""Going on with a run: which flags it has, which may change, and what a failed beginning leaves."""

import argparse
import json

import pytest

from mlx_redrafter import UserError
from mlx_redrafter.training.flags import add_arguments
from mlx_redrafter.training.resume import FREE_TO_CHANGE, arguments_of, defaults, forget, resumed


def parse(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


@pytest.fixture
def begun(tmp_path):
    """A run of one flag of each sort, with readings, stopped before its first checkpoint."""
    notes = tmp_path / "training"
    (notes / "readings-0").mkdir(parents=True)
    flags = ["--seed", "3", "--iters", "50", "--no-rnn", "--temps", "0", "1", "--batch-size", "6"]
    (notes / "arguments.json").write_text(json.dumps(arguments_of(parse("--out", "elsewhere", *flags)) | {"old": 1}))
    return tmp_path


def test_flags_are_those_of_the_run(begun):
    """If this fails, a run goes on with other flags than it began with."""
    args = resumed(parse("--out", begun, "--resume", "--iters", "70"))
    assert (args.seed, args.iters, args.no_rnn, args.temps, args.out) == (3, 70, True, [0.0, 1.0], str(begun))
    assert args.resume and not hasattr(args, "old") and (begun / "training" / "readings-0").exists()
    assert arguments_of(args).keys() == arguments_of(parse("--out", "x")).keys()


def test_what_may_change(begun):
    """If this fails, a changed flag is ignored, or changes what half of a run has learned."""
    values = {name: value for name, value in defaults().items() if name not in (*FREE_TO_CHANGE, "no_rnn", "given")}
    for name, value in values.items():
        new = {
            "model": "m",
            "recipe": "apple",
            "loss": "hard",
            "method": "medusa",
            "output_layer": "random",
            "train_dtype": "float32",
            "dropout": "0.5",
        }
        word = new.get(name, "17" if not isinstance(value, str) or name == "seed" else "x")
        flag = f"--{name.replace('_', '-')}"
        words = [flag] if value is False else [flag, word]
        (begun / "training" / "checkpoint.safetensors").unlink(missing_ok=True)
        assert getattr(resumed(parse("--out", begun, "--resume", *words)), name) != begun_value(begun, name)
        (begun / "training" / "checkpoint.safetensors").touch()
        with pytest.raises(UserError, match=f"^{flag} is .*, but the run to resume has .*; such a change needs"):
            resumed(parse("--out", begun, "--resume", *words))
    resumed(parse("--out", begun, "--resume", "--seed", "3", "--iters", "9", "--dtype", "float16", "--patience", "2"))


def begun_value(begun, name):
    return json.loads((begun / "training" / "arguments.json").read_text())[name]


def test_a_batch_that_did_not_split_can_be_corrected(begun):
    """If this fails, text written for hours is lost to a --batch-size; readings of other flags must not be kept."""
    assert resumed(parse("--out", begun, "--resume", "--batch-size", "8")).batch_size == 8
    assert not (begun / "training" / "readings-0").exists()


def test_damaged_flags(begun):
    """If this fails, a run goes on with a value that no shell would take."""
    file = begun / "training" / "arguments.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"save_every": 0}))
    with pytest.raises(UserError, match=r"arguments.json: --save-every is 0, expected 1 or more"):
        resumed(parse("--out", begun, "--resume"))


def test_no_run_to_go_on_with(tmp_path):
    with pytest.raises(UserError, match=r"arguments.json does not exist; there is no run to go on with"):
        resumed(parse("--out", tmp_path, "--resume"))


@pytest.mark.parametrize(
    ("data", "shards", "full", "stays"),
    [
        ("self", 1, False, True),
        ("self", 0, True, False),
        ("a.txt", 1, True, True),
        ("a.txt", 1, False, False),
        ("a.txt", 0, False, False),
    ],
)
def test_what_a_failed_beginning_leaves(begun, data, shards, full, stays):
    """If this fails, hours of written text are removed, or a wrong file blocks the corrected command."""
    (begun / "training" / "text").mkdir()
    for shard in range(shards):
        (begun / "training" / "text" / f"shard-0000{shard}.npy").touch()
    error = UserError("no")
    error.__cause__ = OSError(28, "No space left on device") if full else None
    forget(begun, begun / "training", parse("--out", begun, "--data", data), error)
    assert begun.exists() == stays
