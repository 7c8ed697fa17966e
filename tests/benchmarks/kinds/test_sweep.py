"""`mlx-redrafter bench sweep`."""

from support.bench import SHORT, bench


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
