"""Tokens per second over machines and latency, as computed."""

import pytest
from mlx_redrafter.benchmarks.machines.step_time import MESH, RING, Setting, main


def setting(topology=MESH):
    return Setting(100.0, {1: 1.0, 5: 1.5}, 0.0, 0.5, 10, 1000, 1.0, topology)


def test_parts_of_a_step():
    """If this fails, what is told of several machines does not follow from what is assumed."""
    mesh, ring = setting(), setting(RING)
    assert mesh.step_ms(1, 0, 5.0) == 100.0 and mesh.step_ms(1, 4, 5.0) == 150.0  # nobody else: no latency
    # Half of the work, 20 sums of a row of 2000 bytes at 1 GB/s, and one of what was chosen.
    assert mesh.step_ms(2, 0, 1.0) == pytest.approx(50 + 20 * (1 + 0.002) + 1)
    assert ring.step_ms(4, 0, 1.0) == pytest.approx(25 + 20 * 6 * (1 + 0.0005) + 6)
    assert mesh.tokens(0) == 1.0 and mesh.tokens(2) == 1.75
    gains = [mesh.speed(2, 4, latency) / mesh.speed(2, 0, latency) for latency in (0.0, 0.1, 1.0, 10.0)]
    assert gains == sorted(gains) and gains[-1] < mesh.tokens(4)


def test_table(capsys):
    """If this fails, the page's command does nothing."""
    main(["--machines", "1", "2", "--latencies-ms", "0.1", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["machines", "1", "2", "2"]
    mixed = ["12:3.17", "1:1", "8:2.25", "5:1.49", "3:1.11"]
    main(["--machines", "1", "2", "--latencies-ms", "0.1", "1", "--costs", *mixed])
    assert capsys.readouterr().out.splitlines() == lines  # in whatever order
    for words in (["--costs", "1"], ["--costs", "0:1", "5:2"], ["--costs", "1:0"], ["--row-ms", "0"]):
        with pytest.raises(SystemExit):
            main(words)
