"""Which target a drafter was made for: what is told apart, and what is not."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_redrafter.convert.drafter import convert_drafter
from support import make_drafter, make_model

import mlx_redrafter
from mlx_redrafter.cli.main import main
from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.target.fingerprint import difference, fingerprint
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.loading import EMBEDDED, load_target


class Characters:
    """A tokenizer of one character each."""

    def __init__(self, shift=0):
        self.shift = shift

    def encode(self, text, add_special_tokens=True):
        return [(ord(c) + self.shift) % 97 for c in text]


def noted(model, tokenizer, name="owner/model"):
    """As it comes back from a file."""
    return json.loads(json.dumps(fingerprint(Target(model), tokenizer, name)))


@pytest.fixture(scope="module")
def embedded():
    model, tokenizer = load_target(EMBEDDED / "target")
    return noted(model, tokenizer), tokenizer


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.set_dtype(mx.float32),
        lambda m: m.set_dtype(mx.float16),
        *(lambda m, bits=bits: nn.quantize(m, 64, bits) for bits in (8, 4, 3, 2)),
        lambda m: nn.quantize(m, 32, 4, mode="mxfp4"),
    ],
    ids=["float32", "float16", "8 bit", "4 bit", "3 bit", "2 bit", "mxfp4"],
)
def test_conversions_leave_it(embedded, change):
    """If this fails, everybody with a quantised target is warned of a mismatch that is none."""
    before, tokenizer = embedded
    model, _ = load_target(EMBEDDED / "target")
    change(model)
    assert difference(before, Target(model), tokenizer) == ""
    if model.model.norm.weight.dtype == mx.float32:  # and noted there, it is known in 16 bits again
        again, _ = load_target(EMBEDDED / "target")
        assert difference(noted(model, tokenizer), Target(again), tokenizer) == ""


def test_float32_training_and_bfloat16_use():
    """If this fails, rounding counts as another model."""
    model = make_model()
    model.model.norm.weight = 1 + 0.3 * mx.random.normal((32,))
    before = noted(model, Characters())
    model.set_dtype(mx.bfloat16)
    assert difference(before, Target(model), Characters()) == ""


def fine_tune(model):
    model.model.norm.weight = model.model.norm.weight * 1.01


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: setattr(m, "model_type", "qwen3"), "model type llama, not qwen3"),
        (lambda m: m.model.layers.pop(), "number of layers 2, not 1"),
        (lambda m: m.update(make_model(seed=1).parameters()), "another embedding"),
        (fine_tune, "another final norm"),
    ],
)
def test_other_models(change, message):
    """If this fails, a drafter for another model drafts badly and nobody hears why."""
    model = make_model()
    before = noted(model, Characters())
    assert difference(before, Target(model), Characters()) == ""
    change(model)
    assert message in difference(before, Target(model), Characters())


def test_other_tokenizers():
    model = make_model()
    assert "another tokenizer" in difference(noted(model, Characters()), Target(model), Characters(shift=1))


@pytest.mark.parametrize("damage", [{"embedding": "zz"}, {"embedding": 5}, {"final_norm": "x"}, {"final_norm": [1.0]}])
def test_unknown_forms_are_a_warning(damage):
    """If this fails, a fingerprint of a later version stops an earlier one with a traceback."""
    model = make_model()
    before = noted(model, Characters())
    assert "unknown form" in difference(before | damage, Target(model), Characters())
    assert difference({"name": "x", "colour": "blue"}, Target(model), Characters()) == ""


def test_names_keep_no_paths():
    model = make_model()
    for given, kept in (("owner/model", "owner/model"), ("/home/me/models/x/", "x"), ("~/x", "x"), ("./y", "y")):
        assert noted(model, Characters(), given)["name"] == kept


def test_noted_by_conversion_and_checked_at_load(stories, tmp_path, caplog, capsys):
    """If this fails, a drafter is not told which target it is for, or a mismatch is silent or an error."""
    model, tokenizer = load_target(stories)
    target = Target(model)
    drafter = make_drafter(vocab=target.vocab_size, hidden=target.hidden_size)
    drafter.save(tmp_path / "plain")
    convert_drafter(str(tmp_path / "plain"), str(tmp_path / "noted"), target=str(stories))
    found = open_drafter(tmp_path / "noted").config.target_fingerprint
    assert found == fingerprint(target, tokenizer, "tiny")
    convert_drafter(str(tmp_path / "noted"), str(tmp_path / "kept"), dtype="float16")
    assert open_drafter(tmp_path / "kept").config.target_fingerprint == found
    mlx_redrafter.load(str(stories), str(tmp_path / "noted"))
    assert not caplog.records
    other = tmp_path / "other"
    shutil.copytree(stories, other, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = dict(mx.load(str(stories / "model.safetensors")))
    weights["model.norm.weight"] = 1.1 * weights["model.norm.weight"]
    mx.save_safetensors(str(other / "model.safetensors"), weights)
    assert mlx_redrafter.load(str(other), str(tmp_path / "noted"))[1] is not None
    (record,) = caplog.records
    line = record.getMessage()
    assert f"{tmp_path / 'noted'}: made for another target than this one, tiny" in line and "\n" not in line
    flags = [
        "--hf-path",
        str(tmp_path / "plain"),
        "--mlx-path",
        str(tmp_path / "x"),
        "--target",
        str(EMBEDDED / "target"),
    ]
    assert main(["convert", "drafter", *flags]) == 2
    assert "hidden_size is 64, but the target's is 384" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_embedded_pair_knows_itself(caplog):
    """If this fails, the first thing a newcomer runs begins with a warning."""
    _, drafter, _ = mlx_redrafter.load()
    assert drafter.config.target_fingerprint is not None and not caplog.records


def test_noted_by_training(stories_pair):
    """If this fails, drafters that are trained here do not know their target."""
    model, drafter, tokenizer = stories_pair
    assert drafter.config.target_fingerprint == fingerprint(Target(model), tokenizer, "tiny")
