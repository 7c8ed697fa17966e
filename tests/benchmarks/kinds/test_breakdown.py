"""`mlx-redrafter bench breakdown`."""

import pytest
from support.bench import SHORT, bench


def test_breakdown(tmp_path, capsys):
    printed, data, _ = bench(tmp_path, capsys, "breakdown", "--methods", "best-first:2x3:4", *SHORT)
    [times] = data["seconds_per_step"].values()
    stages = [f"{stage}, {part}" for stage in ("draft", "verify", "accept and commit") for part in ("built", "run")]
    assert set(times) == {"whole step", "device alone", "host, visible", "host, building the graph", *stages}
    assert all(0 < one["low"] <= one["median"] <= one["high"] for part, one in times.items() if part != "host, visible")
    whole, device, visible = (times[part]["median"] for part in ("whole step", "device alone", "host, visible"))
    assert visible == pytest.approx(whole - device, abs=1e-9)  # two texts, whose medians are means
    for part in ("whole step", "device alone"):
        assert f"{1e3 * times[part]['median']:.2f} ({1e3 * times[part]['low']:.2f} to" in printed
