"""`convert target` of a GGUF file: as it is, quantised anew, in full."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx_lm
from support import gguf_files

from mlx_redrafter.cli.main import main


def convert(file, folder, *flags) -> dict:
    assert main(["convert", "target", "--hf-path", str(file), "--mlx-path", str(folder), *flags]) == 0
    mlx_lm.load(str(folder))
    return json.loads((folder / "config.json").read_text())


def test_convert_keeps_packed_weights(file, tmp_path, capsys):
    config = convert(file, tmp_path / "out")
    assert config["quantization"] == {"bits": 8, "group_size": 32, "mode": "affine"}
    output = capsys.readouterr()
    assert f"{file}: 16 Q8_0, 5 F32 exactly as in the file" in output.err
    assert f"{tmp_path / 'out'}: an mlx-lm model" in output.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_convert_quantises_anew(file, tmp_path, capsys):
    config = convert(file, tmp_path / "out", "-q", "--q-bits", "4", "--q-group-size", "64")
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (4, 64)
    assert "16 Q8_0 dequantised to float16, to be quantised anew" in capsys.readouterr().err
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert len(written["eos_token_id"]) == 3
    _, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    assert tokenizer.chat_template == gguf_files.TEMPLATE and len(tokenizer.eos_token_ids) == 3


def test_convert_dequantises(file, tmp_path):
    config = convert(file, tmp_path / "out", "-d", "--dtype", "float32")
    weights = mx.load(str(tmp_path / "out/model.safetensors"))
    assert {value.dtype for value in weights.values()} == {mx.float32} and "quantization" not in config
