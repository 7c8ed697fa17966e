"""Damaged models, and what a conversion says of them."""

import json
import shutil

import mlx.core as mx
import pytest

from mlx_redrafter.cli.main import main


def without_shard_2(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def rewrite_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = change(index["weight_map"])
    file.write_text(json.dumps(index))


def reshaped(folder):
    file = folder / "model-00001-of-00003.safetensors"
    weights = dict(mx.load(str(file)))
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:, :32]
    mx.eval(weights)
    mx.save_safetensors(str(file), weights)


def config_of(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "damage, message",
    [
        (without_shard_2, "model-00002-of-00003.safetensors: no such file, though model.safetensors.index.json names"),
        (
            lambda f: rewrite_index(f, lambda m: {k: v for k, v in m.items() if "00002" not in v}),
            "model-00002-of-00003.safetensors: is there, but model.safetensors.index.json does not name it",
        ),
        (
            lambda f: rewrite_index(f, lambda m: m | {"model.extra": "model-00002-of-00003.safetensors"}),
            "model-00002-of-00003.safetensors: tensor 'model.extra' is missing, though",
        ),
        (
            lambda f: [(f / "model.safetensors.index.json").unlink(), without_shard_2(f)],
            "model-00002-of-00003.safetensors: no such file, though model-00001-of-00003.safetensors is one of 3",
        ),
        (reshaped, "model.embed_tokens.weight"),
        (lambda f: config_of(f, hidden_size=128), "mlx-lm cannot load it: Expected shape"),
        (lambda f: config_of(f, num_hidden_layers=2), "mlx-lm cannot load it: Received"),
        (
            lambda f: config_of(f, model_type="recurrent_drafting_drafter"),
            "is a drafter; use `mlx-redrafter convert dr",
        ),
        (lambda f: (f / "tokenizer.model").unlink(), "no tokenizer that transformers can read"),
        (lambda f: (f / "tokenizer.model").write_bytes(b"no"), "no tokenizer that transformers can read"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_damaged_models(vicuna, tmp_path, capsys, damage, message):
    """If this fails, a damaged model ends in a traceback, or leaves half a directory."""
    source = tmp_path / "hf"
    shutil.copytree(vicuna, source)
    damage(source)
    assert main(["convert", "target", "--hf-path", str(source), "--mlx-path", str(tmp_path / "mlx")]) == 2
    err = capsys.readouterr().err
    line = err.splitlines()[-1]
    assert message in line and err.count("mlx-redrafter: error") == 1 and "Traceback" not in err, err
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
