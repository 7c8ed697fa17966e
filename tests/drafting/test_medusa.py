"""The files of Medusa heads."""

import json

import mlx.core as mx
import pytest
from support.medusa import make_heads

from mlx_redrafter import UserError
from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.medusa import MedusaHeads


def test_round_trip(tmp_path):
    heads = make_heads(layers=2, medusa_choices=((1,), (1, 0), (0,)))
    heads.save(tmp_path)
    again = open_drafter(tmp_path)
    assert isinstance(again, MedusaHeads) and again.config == heads.config
    context = mx.random.normal((3, 32))
    assert mx.array_equal(again(context), heads(context))
    assert again(context, 2).shape == (3, 2, 97)


def test_quantised(tmp_path):
    heads = make_heads(hidden=64)
    context = mx.random.normal((3, 64))
    before = heads(context)
    heads.quantize(32, 8)
    heads.save(tmp_path)
    again = open_drafter(tmp_path)
    assert again.config.quantization == {"group_size": 32, "bits": 8}
    assert mx.array_equal(again(context), heads(context))
    assert 0 < mx.abs(again(context) - before).max().item() < 0.1
    with pytest.raises(UserError, match="--q-group-size is 64, which does not divide the drafter's hidden_size 32"):
        make_heads().quantize(64, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 0}, "vocab_size is 0, expected a whole number from 1"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"medusa_num_heads": 32}, "medusa_num_heads is 32, expected 1 to 31"),
        ({"medusa_num_heads": 5}, "tensor 'heads.4.blocks.0.linear.weight' is missing"),
        ({"medusa_num_layers": "x"}, "medusa_num_layers is 'x'"),
        ({"medusa_choices": []}, "expected a list of paths"),
        ({"medusa_choices": [[0], [1, 0]]}, "path [1, 0] twice, or before the one it continues"),
        ({"medusa_choices": [[0], [0]]}, "path [0] twice"),
        ({"medusa_choices": [[0], [0, "a"]]}, "path [0, 'a'], expected 1 to 4 ranks from 0 to 63"),
        ({"medusa_choices": [[0] * 5]}, "expected 1 to 4 ranks"),
        ({"quantization": {"bits": 4}}, "expected group_size and bits"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quantization: --q-group-size is 64"),
        ({"target_fingerprint": 1}, "target_fingerprint is 1, expected an object"),
        ({"hidden_size": 33}, "has shape (32, 32), expected (33, 33)"),
    ],
)
def test_a_damaged_config_is_one_line(tmp_path, change, message):
    make_heads().save(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError) as error:
        open_drafter(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)
