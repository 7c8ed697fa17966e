"""mlx_lm's server has what ours relies on, or a user is told in one line."""

from typing import Any

import mlx_lm.server
import pytest

from mlx_redrafter import UserError
from mlx_redrafter.server import seam


def test_the_installed_one_has_it_all():
    assert seam.missing_names() == []


@pytest.mark.parametrize(
    "owner, name, words",
    [
        (mlx_lm.server.ResponseGenerator, "_serve_single", "ResponseGenerator._serve_single"),
        (mlx_lm.server, "load_processor", r"load_processor\(model\)"),
        (mlx_lm.server, "Response", "Response.text"),
    ],
)
def test_one_that_lacks_something(monkeypatch, owner, name, words):
    """If this fails, another mlx-lm ends in a traceback, or in texts of its own loop."""
    monkeypatch.setattr(seam, "_THEIRS", [])
    monkeypatch.delattr(owner, name)
    with pytest.raises(UserError, match=f"serve needs mlx-lm 0.32, found .* \\({words} is missing\\)"):
        seam.install()


def test_others_keep_their_generation():
    """If this fails, a program that uses mlx_lm.server beside ours gets our loop."""
    seam.install()
    generate: Any = mlx_lm.server.stream_generate
    with seam.generating(lambda **arguments: iter(["ours"])):
        assert list(generate(model=None)) == ["ours"]
    with pytest.raises(TypeError, match="tokenizer"):
        generate(model=None)
