"""`mlx-redrafter tune`, the files behind it, and the flags that leave the choice to the program."""

import json

import pytest
from mlx_redrafter.decoding.steering import Outcome
from mlx_redrafter.tuning.calibration import Calibration
from support import make_drafter, make_model
from support.costs import made_up

from mlx_redrafter import DraftShape, UserError, stream_generate
from mlx_redrafter.cli.main import main
from mlx_redrafter.system import openblas
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.tuning import store
from mlx_redrafter.tuning.session import tuning_for
from mlx_redrafter.tuning.store import Kept

KEY = {"device": "a device"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "tuning"))
    monkeypatch.setattr("mlx_redrafter.tuning.session._measured", {})
    return tmp_path / "tuning"


def kept():
    calibration = Calibration()
    calibration.learn(Outcome(DraftShape(), 2, [1, 1, 1], [0, 0]))
    return Kept(KEY, made_up(lambda rows: 1.0 + rows), {"abc": calibration})


def test_files_there_and_back(folder):
    assert store.read(KEY) is None
    file = store.write(kept())
    assert file.parent == folder and list(folder.iterdir()) == [file]  # nothing half-written beside it
    assert store.read(KEY) == kept()
    assert store.read({"device": "another"}) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda fields: "",
        lambda fields: json.dumps(fields)[:100],
        lambda fields: "[]",
        lambda fields: json.dumps(fields | {"version": 0}),
        lambda fields: json.dumps(fields | {"key": {}}),
        lambda fields: json.dumps(fields | {"costs": {}}),
        lambda fields: json.dumps(fields | {"costs": fields["costs"] | {"plain": {"128": -1}}}),
        lambda fields: json.dumps(fields | {"costs": fields["costs"] | {"plain": {"128": float("nan")}}}),
        lambda fields: json.dumps(fields | {"costs": fields["costs"] | {"verify": {"128": {}}}}),
        lambda fields: json.dumps(fields | {"costs": fields["costs"] | {"draft": []}}),
        lambda fields: json.dumps(fields | {"calibrations": {"abc": {"right": [1]}}}),
        lambda fields: json.dumps(fields | {"calibrations": {"abc": {"steps": "x", "wrong": 1}}}),
        lambda fields: b"\xff\xfe\x00",
    ],
    ids=range(13),
)
def test_damaged_files_count_as_none(folder, damage):
    """If this fails, a file that a crash or another version left breaks every text from then on."""
    file = store.write(kept())
    content = damage(json.loads(file.read_text()))
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert store.read(KEY) is None
    store.write(kept())
    assert store.read(KEY) == kept()


def test_where_files_are_kept(tmp_path, monkeypatch):
    monkeypatch.delenv(store.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.file_for(KEY).parent == tmp_path / "mlx-redrafter" / "tuning"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(openblas.pathlib.Path, "home", lambda: tmp_path)
    for system, place in (("darwin", "Library/Caches"), ("linux", ".cache")):
        monkeypatch.setattr(openblas.sys, "platform", system)
        assert store.file_for(KEY).parent == tmp_path / place / "mlx-redrafter" / "tuning"
    monkeypatch.setenv(store.VARIABLE, "off")
    assert store.file_for(KEY) is None and store.write(kept()) is None
    monkeypatch.setenv(store.VARIABLE, "/proc/nope")
    assert store.write(kept()) is None and store.read(KEY) is None


def test_what_was_learnt_is_kept(folder):
    """If this fails, every process finds out anew that a drafter is of no use."""
    verifier, drafter = verifier_of(make_model()), make_drafter()
    tuning = tuning_for(verifier, drafter)
    for _ in range(40):
        tuning.memory.note_outcome(Outcome(DraftShape(), 0, [1, 1, 1], []))
    tuning.save()
    same, other = (tuning_for(verifier, make_drafter(seed=seed)).memory.calibration for seed in (0, 1))
    assert same.steps == 40 and same.first()[0] < 0.1
    assert other.steps == 0 and other.first()[0] > 0.5
    fresh = tuning_for(verifier, drafter, fresh=True)
    assert fresh is not tuning and fresh.fresh and fresh.memory.calibration.steps == 0


def test_the_command(folder, capsys):
    assert main(["tune", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["measured_now"] and facts["file"].startswith(str(folder))
    speeds = [one["expected_tokens_per_second"] for one in facts["candidates"]]
    assert speeds == sorted(speeds, reverse=True) and None in [one["shape"] for one in facts["candidates"]]
    assert facts["choice"] in [one["shape"] for one in facts["candidates"]]
    for one in facts["candidates"]:
        assert one["expected_tokens_per_second"] == pytest.approx(
            one["expected_acceptance_length"] / one["seconds_per_step"]
        )
    assert main(["tune"]) == 0
    out = capsys.readouterr().out
    assert f"Measured before; kept in {facts['file']}" in out and "Choice to begin with: " in out
    seconds = facts["costs"]["verify"]["128"]["16"]
    assert any(line.split()[:2] == ["16", f"{1e3 * seconds:.2f}"] for line in out.splitlines())


def test_mistakes(capsys):
    assert main(["tune", "--draft", "none"]) == 2
    assert "--draft is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["generate", "-p", "x", "--beam-width", "wide"])
    err = capsys.readouterr().err
    assert "argument --beam-width: 'wide' is neither a whole number nor auto" in err and err.count("\n") == 1


def test_no_other_words_for_a_shape(pair):
    with pytest.raises(UserError, match="shape is 'wide', expected a DraftShape or 'auto'"):
        next(stream_generate(pair[0], pair[2], "x", pair[1], shape="wide"))
    with pytest.raises(UserError, match="shape is None"):
        next(stream_generate(pair[0], pair[2], "x", pair[1], shape=None))
