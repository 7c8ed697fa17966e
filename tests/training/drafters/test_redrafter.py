"""Heads with prefix attention of several layers: trained, described, gone on from."""

import mlx.core as mx
import pytest
from support.commands import code_of

from mlx_redrafter.drafting.kinds import open_drafter

SMALL = ["--rows", "20", "--held-out", "2", "--row-length", "40", "--prefix-length", "8", "--eval-every", "0"]


@pytest.fixture(scope="module")
def trained(stories, tmp_path_factory):
    out = tmp_path_factory.mktemp("prefix") / "drafter"
    flags = ["--prefix-layers", "2", "--iters", "3", "--dtype", "float32"]  # the usual recipe says the window
    assert code_of("train", "--model", str(stories), "--out", str(out), *SMALL, *flags) == 0
    return out


def test_what_is_trained(trained):
    """If this fails, a layer is left out or does not learn, or a card tells of another head than there is."""
    prefix = open_drafter(trained).prefix
    assert (len(prefix.layers), prefix.window) == (2, 256)
    for layer in prefix.layers:  # all ones to begin with, which decay together
        assert layer.input_layernorm.weight.min() < layer.input_layernorm.weight.max()
    card = (trained / "README.md").read_text()
    assert ", prefix attention of 2 layers over 256 tokens, " in card and "--prefix-layers 2" in card


def test_going_on(trained, stories, tmp_path, capsys):
    """If this fails, a head of several layers is told to be another, or begins anew."""
    text = ["--model", str(stories), "--text", str(trained / "training" / "text"), "--eval-every", "0"]
    more = ["--init", str(trained), "--iters", "1", "--learning-rate", "1e-9"]
    for flags in ([], ["--prefix-layers", "2"]):
        out = tmp_path / f"more{len(flags)}"
        assert code_of("train", *text, *more, *flags, "--out", str(out)) == 0
        before, after = (open_drafter(folder).prefix.layers[1].mlp.up_proj.weight for folder in (trained, out))
        assert mx.allclose(before, after, atol=1e-2)
    for flags, message in (
        ([*more, "--prefix-layers", "1"], f"--prefix-layers is 1, but --init {trained} has 2"),
        (["--recipe", "plain", "--prefix-layers", "2"], "--prefix-layers needs --prefix-window"),
        (["--prefix-layers", "0"], "--prefix-layers is 0, expected 1 to 64"),
        (["--method", "medusa", "--prefix-layers", "2"], "--prefix-layers does not apply to --method medusa"),
        (["--method", "draft-model", "--prefix-layers", "2"], "--prefix-layers does not apply to --method draft-model"),
    ):
        capsys.readouterr()
        assert code_of("train", *text, *flags, "--out", str(tmp_path / "out")) == 2
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said
