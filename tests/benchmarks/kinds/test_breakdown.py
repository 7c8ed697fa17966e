"""`mlx-redrafter bench breakdown`."""

from support.bench import SHORT, bench


def test_breakdown(tmp_path, capsys):
    _, data, _ = bench(tmp_path, capsys, "breakdown", "--methods", "best-first:2x3:4", *SHORT)
    [times] = data["seconds_per_step"].values()
    for part in ("draft", "verify", "accept and commit"):
        assert times[f"{part}, built"]["median"] > 0 and times[f"{part}, run"]["median"] > 0
    assert times["whole step"]["median"] > 0 and times["device alone"]["median"] > 0
