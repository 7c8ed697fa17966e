"""`mlx-redrafter bench serve`."""

from support.bench import SHORT, bench, refused


def test_serve(tmp_path, capsys):
    """If this fails, what is measured is not two ways to the same texts."""
    printed, data, _ = bench(tmp_path, capsys, "serve", "--num-draft-tokens", "2", *SHORT)
    assert data["equal"] == 2 and "equal: 2/2" in printed
    for a, b in zip(data["runs"]["generate"], data["runs"]["serve"], strict=True):
        assert a["tokens"] == b["tokens"] == 10 and a["text"] == b["text"] != ""
        assert min(a["first"], a["rest"], b["first"], b["rest"]) > 0
    assert data["ratios"].keys() == {"first token", "tokens/s"}


def test_a_server_that_does_not_start(tmp_path, capsys, monkeypatch):
    """If this fails, the benchmark waits for ever for a server that has ended, or does not say why it did."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setattr("mlx_redrafter.benchmarks.kinds.served.SERVE_FLAGS", ["--port", "99999"])
    assert "the server did not start: --port is 99999" in refused(capsys, "serve", *SHORT)
