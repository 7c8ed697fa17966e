"""`mlx-redrafter tune`, and the flags that leave the choice to the program."""

import json

import pytest

from mlx_redrafter import UserError, stream_generate
from mlx_redrafter.cli.main import main
from mlx_redrafter.tuning import store


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "tuning"))
    monkeypatch.setattr("mlx_redrafter.tuning.session._measured", {})
    return tmp_path / "tuning"


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
