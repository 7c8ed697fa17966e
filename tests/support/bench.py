"""Runs a kind of `mlx-redrafter bench` for tests."""

import json

from mlx_redrafter.cli.main import main

SHORT = ["--num-prompts", "2", "--prompt-tokens", "24", "-m", "10"]


def bench(tmp_path, capsys, kind, *flags):
    """What a kind printed, and its JSON and Markdown; its chart is a PNG."""
    out = tmp_path / "out"
    assert main(["bench", kind, *flags, "--out", str(out)]) == 0
    assert (out / f"{kind}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(path.name for path in out.iterdir()) == [f"{kind}.{s}" for s in ("json", "md", "png")]
    data, text = json.loads((out / f"{kind}.json").read_text()), (out / f"{kind}.md").read_text()
    assert data["command"].startswith(f"mlx-redrafter bench {kind} ") and data["command"] in text
    assert data["facts"]["device"] and "float32" in data["facts"]["target"]
    return capsys.readouterr().out, data, text


def refused(capsys, *argv):
    """The one line of an error that `mlx-redrafter bench` ends with."""
    try:
        code = main(["bench", *map(str, argv)])
    except SystemExit as stopped:  # of a flag that argparse refuses
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("mlx-redrafter: error: ") and error.count("\n") == 1, error
    return error
