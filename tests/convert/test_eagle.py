"""EAGLE-3 heads from checkpoint to command, and what is wrong with those that cannot be read."""

import json

import mlx.core as mx
import pytest
from mlx_redrafter.convert.drafter import convert_drafter
from support import DATA, make_model
from support.commands import code_of

from mlx_redrafter import UserError
from mlx_redrafter.cli.main import main
from mlx_redrafter.drafting.cached.eagle import EagleConfig, EagleHead
from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.system.weights import tensors
from mlx_redrafter.target.model import Target

TARGET = json.loads((DATA / "tiny" / "config.json").read_text())
SIZES = {name: TARGET[name] for name in ("hidden_size", "num_attention_heads", "rms_norm_eps")}
LAYER = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}
DRAFTED = 100
AUX = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}}


def published(folder, without=(), **changes):
    """A checkpoint of a random head for the target that writes stories, as SafeAILab's code writes it."""
    mx.random.seed(0)
    size, vocab = TARGET["hidden_size"], TARGET["vocab_size"]
    weights = tensors(EagleHead(EagleConfig(vocab, size, LAYER, DRAFTED)))
    weights["d2t"] = 3 * mx.arange(DRAFTED, dtype=mx.int64)
    weights["t2d"] = mx.zeros((vocab,), mx.bool_)
    del weights["vocab_map"]
    folder.mkdir()
    fields = LAYER | {"model_type": "llama", "vocab_size": vocab, "draft_vocab_size": DRAFTED} | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    named = {name.replace("layer.", "midlayer.", 1) if name.startswith("layer.") else name: weights[name]
        for name in weights if name not in without}  # fmt: skip
    mx.save_safetensors(str(folder / "model.safetensors"), named)
    return folder


def test_the_commands(tmp_path, capsys):
    """If this fails, a published head cannot be used with the commands that a README names."""
    source, made = published(tmp_path / "hf", **AUX), tmp_path / "mlx"
    target = ["--model", str(DATA / "tiny"), "--dtype", "float32"]
    text = ["-p", "Once upon a time", "-m", "20", "--json"]
    assert main(["inspect", str(source)]) == 0
    assert "conversion: mlx-redrafter convert drafter" in capsys.readouterr().out
    assert code_of("generate", *target, "--draft", str(source), *text) == 2
    assert "as published; run `mlx-redrafter convert drafter` on it first" in capsys.readouterr().err
    convert = ["convert", "drafter", "--hf-path", str(source), "--target", str(DATA / "tiny"), "--mlx-path"]
    assert main([*convert, str(made)]) == 0
    assert main([*convert, str(tmp_path / "q"), "-q", "--q-bits", "8", "--q-group-size", "32"]) == 0
    ids = open_drafter(made).vocab_map
    assert ids.tolist() == [4 * i for i in range(DRAFTED)]
    capsys.readouterr()
    assert main(["inspect", str(made)]) == 0
    said = capsys.readouterr().out
    assert "lacks          nothing" in said and f"hidden size {TARGET['hidden_size']}" in said
    texts = []
    for draft in ([], ["--draft", str(made)], ["--draft", str(tmp_path / "q"), "--beam-width", "2"]):
        assert main(["generate", *target, *draft, *text]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0]["text"] == texts[1]["text"] == texts[2]["text"] and texts[2]["method"] == "eagle3"


MISTAKES = {
    "two layers": ({"num_hidden_layers": 2}, (), "config.json: num_hidden_layers is 2, expected 1"),
    "another norm": ({"norm_before_fc": True}, (), "norm_before_fc is True; only heads without it"),
    "no map": ({}, ("d2t",), "tensor 'd2t' is missing, which says which tokens are drafted"),
    "a tensor too few": ({}, ("fc.weight",), "tensor 'fc.weight' is missing"),
    "no size": ({"hidden_size": None}, (), "config.json: hidden_size is None, expected"),
    "another width": ({"target_hidden_size": 1024}, (), "wide, the target's embedding 1024"),
    "taps by name": ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": ["a"]}}, (), "context_layers is ['a']"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, tmp_path, capsys):
    """If this fails, a head of another kind is converted all the same, or there is a traceback."""
    changes, without, says = MISTAKES[mistake]
    source = published(tmp_path / "hf", without, **changes)
    assert code_of("convert", "drafter", "--hf-path", str(source), "--mlx-path", str(tmp_path / "mlx")) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "mlx").exists()


def test_wrong_targets(tmp_path):
    """If this fails, a head drafts nonsense for another target, or reads layers that are not there."""
    head = open_drafter(convert_drafter(str(published(tmp_path / "hf")), str(tmp_path / "mlx")))
    with pytest.raises(UserError, match="it: hidden_size is 64, but the target's is 32"):
        check_pair(Target.of(make_model()), head, "it")
    with pytest.raises(UserError, match="it: layer -1 is to be read; the target's 2 are too few"):
        check_pair(Target.of(make_model(vocab=TARGET["vocab_size"], hidden=64)), head, "it")
