"""What has no form in transformers' layout is not exported."""

import contextlib

import pytest
from mlx_redrafter.convert.export import _check_layout
from support import make_drafter
from support.vicuna import tensors

from mlx_redrafter import UserError
from mlx_redrafter.cli.main import main
from mlx_redrafter.text.loading import EMBEDDED


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda shapes: {"model.mlp.switch.weight": (3, 4)}, "transformers has no tensor 'model.mlp.switch.weight'"),
        (lambda shapes: {"model.norm.weight": (385,)}, r"'model.norm.weight' has shape \(385,\), but .* \(384,\)"),
        (lambda shapes: shapes.pop("model.norm.weight") and {}, "tensor 'model.norm.weight' of transformers' model is"),
        (lambda shapes: {}, None),  # the tied lm_head may be missing
    ],
)
def test_export_checks_the_layout(change, message):
    """If this fails, an export gives files that transformers reads as something else, or half."""
    pytest.importorskip("torch")
    target = EMBEDDED / "target"
    shapes = {name: value.shape for name, value in tensors(target).items()}
    shapes |= change(shapes)
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        _check_layout(target, target, shapes)


def test_export_refuses_light_drafters(tmp_path, capsys):
    make_drafter(draft_vocab_size=10).save(tmp_path / "light")
    assert main(["convert", "export", "--mlx-path", str(tmp_path / "light"), "--hf-path", str(tmp_path / "hf")]) == 2
    assert "draft_vocab_size is 10, for which this layout has no form" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["light"]
