"""Multi-token-prediction layers from a model's directory to commands, and what is wrong with those that cannot be."""

import json
import shutil
from unittest.mock import create_autospec

import mlx.core as mx
import pytest
from mlx_redrafter.benchmarks.architectures import small_models
from mlx_redrafter.convert.drafter import convert_drafter
from support import make_model
from support.commands import code_of
from support.hybrids import write_pair
from support.serving import parsed

from mlx_redrafter import UserError
from mlx_redrafter.cli.main import main
from mlx_redrafter.drafting.cached.mtp import MtpConfig, MtpHead
from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.server.provider import DEFAULT, Provider
from mlx_redrafter.system import hub
from mlx_redrafter.system.files import read_safetensors
from mlx_redrafter.system.weights import tensors
from mlx_redrafter.target.model import Target

NAMES = {
    "fc": "input_proj",
    "embedding_norm": "token_layernorm",
    "context_norm": "hidden_layernorm",
    "body.norm": "final_layernorm",
}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A small MiMo with its layer, as it is published, in two files."""
    write_pair("mimo", tmp_path, monkeypatch)
    config = small_models.config("mimo")
    mx.random.seed(0)
    layer = MtpHead(MtpConfig(config["vocab_size"], config["hidden_size"], config))
    found = {}
    for name, value in tensors(layer).items():
        stem, _, kind = name.rpartition(".")
        found[f"model.mtp_layers.0.{NAMES.get(stem, stem.removeprefix('body.layers.0.'))}.{kind}"] = value
    write(tmp_path / "target", found)
    return tmp_path / "target"


def write(folder, layer, without=()):
    """Puts a layer's tensors into a file of its own."""
    whole, rest = folder / "model.safetensors", folder / "model-00001-of-00002.safetensors"
    if whole.exists():
        whole.rename(rest)
    layer = {name: value for name, value in layer.items() if name not in without}
    mx.save_safetensors(str(folder / "model-00002-of-00002.safetensors"), layer)
    places = dict.fromkeys(read_safetensors(rest), rest.name) | dict.fromkeys(layer, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_the_commands(model, tmp_path, capsys):
    """If this fails, a model's own layer cannot be used with the commands that the docs name."""
    made, small = tmp_path / "mlx", tmp_path / "q"
    text = ["generate", "--model", str(model), "-p", "import os", "-m", "12", "--json"]
    assert main(["inspect", str(model)]) == 0
    assert "has a multi-token-prediction layer that drafts for it: --draft mtp" in capsys.readouterr().out
    convert = ["convert", "drafter", "--hf-path", str(model), "--mlx-path"]
    assert main([*convert, str(made), "--target", str(model)]) == 0
    assert main([*convert, str(small), "-q", "--q-bits", "8", "--q-group-size", "32"]) == 0
    # Where a conversion left the layer out, the drafter made of the original drafts.
    assert main(["convert", "target", "--hf-path", str(model), "--mlx-path", str(tmp_path / "less")]) == 0
    assert "mtp" not in "".join(read_safetensors(tmp_path / "less" / "model.safetensors"))
    capsys.readouterr()
    assert main(["inspect", str(made)]) == 0
    said = capsys.readouterr().out
    assert "lacks          nothing" in said and "multi-token-prediction layer of a mimo model, for targets of" in said
    texts = []
    less = [*text[:2], str(tmp_path / "less"), *text[3:]]
    for argv in (text, [*text, "--draft", "mtp"], [*less, "--draft", str(made)], [*text, "--draft", str(small)]):
        shape = ["--beam-width", "2", "--beam-length", "3"] if "--draft" in argv else []
        assert main([*argv, *shape]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert len({found["text"] for found in texts}) == 1 and [t["method"] for t in texts[1:]] == ["mtp"] * 3
    assert code_of("convert", "export", "--mlx-path", str(made), "--hf-path", str(tmp_path / "back")) == 2
    assert "is a multi-token-prediction layer, which is not exported" in capsys.readouterr().err


def test_models_without_a_layer(model, tmp_path, capsys):
    """If this fails, a model that lost its layer is not told from one that has it, nor what helps."""
    (model / "model-00002-of-00002.safetensors").unlink()
    write(model, {})
    (model / "model-00002-of-00002.safetensors").unlink()
    assert code_of("generate", "--model", str(model), "--draft", "mtp", "-p", "x", "-m", "1") == 2
    said = capsys.readouterr().err
    assert "target: has no multi-token-prediction layer" in said and "--hf-path ORIGINAL --mlx-path NEW" in said
    assert code_of("convert", "drafter", "--hf-path", str(model), "--mlx-path", str(tmp_path / "new")) == 2
    assert "is a model without a multi-token-prediction layer, not a drafter" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_of_a_repository_only_the_layer_is_downloaded(model, tmp_path, monkeypatch):
    """If this fails, a hundred files of a model are downloaded for the one that is read."""
    copy = tmp_path / "hub"
    copy.mkdir()

    def download(repo, repo_type=None, allow_patterns=None):
        for file in model.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, copy)
        return str(copy)

    monkeypatch.setattr(hub, "snapshot_download", create_autospec(hub.snapshot_download, side_effect=download))
    convert_drafter("owner/model", str(tmp_path / "mlx"))
    files = {"config.json", "model.safetensors.index.json", "model-00002-of-00002.safetensors"}
    assert {file.name for file in copy.iterdir()} == files and open_drafter(tmp_path / "mlx").method == "mtp"


def test_a_server_drafts_with_it(model):
    """If this fails, `serve --draft mtp` does not start, or looks for a directory of that name."""
    provider = Provider(parsed("--model", str(model), "--draft", "mtp", "--num-draft-tokens", "3"))
    provider.load_default()
    layer = provider.drafter
    provider.load(DEFAULT, None, "none")
    provider.load(DEFAULT, None, "mtp")
    assert layer.method == "mtp" and provider.drafter is layer


MISTAKES = {
    "a tensor too few": (
        "model.mtp_layers.0.self_attn.k_proj.bias",
        {},
        "'body.layers.0.self_attn.k_proj.bias' is mis",
    ),
    "a norm too few": ("model.mtp_layers.0.token_layernorm.weight", {}, "cannot read its multi-token-prediction layer"),
    "another width": ("", {"intermediate_size": 64}, "has shape"),
    "no sizes": ("", {"hidden_size": None}, "config.json: hidden_size is None, expected a whole number"),
    "another kind": ("", {"model_type": "t5"}, "config.json: mlx-lm cannot make a layer of such a model"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, model, tmp_path, capsys):
    """If this fails, a layer is converted in parts, or there is a traceback."""
    name, changes, says = MISTAKES[mistake]
    layer = read_safetensors(model / "model-00002-of-00002.safetensors")
    mx.eval(layer)
    write(model, layer, [name])
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(fields | changes))
    assert code_of("convert", "drafter", "--hf-path", str(model), "--mlx-path", str(tmp_path / "new")) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_wrong_targets(model, tmp_path):
    """If this fails, a layer drafts nonsense for a model of another size, or a damaged one is read."""
    made = tmp_path / "mlx"
    assert main(["convert", "drafter", "--hf-path", str(model), "--mlx-path", str(made)]) == 0
    with pytest.raises(UserError, match="it: hidden_size is 64, but the target's is 32"):
        check_pair(Target.of(make_model()), open_drafter(made), "it")
    fields = json.loads((made / "config.json").read_text())
    for change, says in (
        ({"model": 3}, "model is 3, expected"),
        ({"quantization": {"bits": 3}}, "expected group_size"),
    ):
        shutil.copytree(made, tmp_path / "copy", dirs_exist_ok=True)
        (tmp_path / "copy" / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(UserError, match=says):
            open_drafter(tmp_path / "copy")
