"""GGUF files at the command line: converted by name, read in the place of a model, chosen among several."""

from __future__ import annotations

import json
import os
import pathlib
import shutil

from support import gguf_files
import mlx.core as mx
import mlx_lm
import pytest
from mlx_redrafter.convert.gguf import find, kept
from mlx_redrafter.convert.gguf.find import find_gguf, is_gguf

from mlx_redrafter.cli.main import main
from mlx_redrafter.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    model = gguf_files.random_model("llama")
    return gguf_files.write_gguf("llama", model, tmp_path_factory.mktemp("made") / "small.gguf", "Q8_0")


@pytest.fixture
def file(made, tmp_path, monkeypatch):
    """A file of one's own, and a cache directory of one's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return pathlib.Path(shutil.copy(made, tmp_path))


def generate(model, *flags) -> int:
    return main(["generate", "--model", str(model), "-p", "hello", "-m", "4", "--draft", "none", *flags])


def kept_folders(tmp_path) -> list[pathlib.Path]:
    return sorted((tmp_path / "cache/mlx-redrafter/gguf").glob("*"))


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


def test_model_is_converted_once(file, tmp_path, capsys, monkeypatch):
    assert generate(file) == 0
    [folder] = kept_folders(tmp_path)
    first = capsys.readouterr()
    assert f"{file}: converted to {folder} (16 Q8_0, 5 F32 exactly as in the file)" in first.err
    monkeypatch.setattr(kept, "write_model", lambda *_: pytest.fail("converted twice"))
    assert generate(file) == 0
    assert capsys.readouterr().out.split("=")[0] == first.out.split("=")[0]


def test_changed_file_is_converted_anew(file, tmp_path):
    assert main(["inspect", str(file), "--bandwidth", "10"]) == 0
    before = kept_folders(tmp_path)
    os.utime(file, ns=(1, 1))
    assert main(["inspect", str(file), "--bandwidth", "10"]) == 0
    after = kept_folders(tmp_path)
    assert len(before) == len(after) == 1 and before != after


def test_another_process_was_faster(file, tmp_path, monkeypatch):
    write = kept.write_model

    def slow(path, folder):
        shutil.copytree(made_by_another, kept.kept_folder(path))
        return write(path, folder)

    made_by_another = tmp_path / "another"
    convert(file, made_by_another)
    monkeypatch.setattr(kept, "write_model", slow)
    assert kept.converted(file) == kept.kept_folder(file)
    assert len(kept_folders(tmp_path)) == 1


def test_bad_file_is_one_line_and_leaves_nothing(file, tmp_path, capsys):
    file.write_bytes(file.read_bytes()[:-100])
    assert generate(file) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mlx-redrafter: error: {file}: truncated, ") and not kept_folders(tmp_path)
    assert main(["convert", "target", "--hf-path", str(file), "--mlx-path", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_one_of_several(file, tmp_path, capsys):
    folder = tmp_path / "several"
    folder.mkdir()
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf", "mmproj-a.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf"):
        shutil.copy(file, folder / name)
    assert generate(folder) == 2
    names = "a-Q4_0.gguf, a-Q8_0.gguf, b-00001-of-00002.gguf"
    assert f"{folder}: holds 3 GGUF files; name one with --gguf: {names}\n" in capsys.readouterr().err
    assert generate(folder, "--gguf", "a-") == 2
    assert "--gguf a- stands for 2 files; expected one of: a-Q4_0.gguf, a-Q8_0.gguf\n" in capsys.readouterr().err
    assert generate(folder, "--gguf", "Q5_K") == 2
    assert f"--gguf Q5_K is no file here; expected one of: {names}\n" in capsys.readouterr().err
    assert generate(folder, "--gguf", "q8_0") == 0
    assert kept_folders(tmp_path)[0].name.startswith("a-Q8_0-")
    assert main(["generate", "--gguf", "q8_0", "-p", "x"]) == 2
    assert "--gguf q8_0 needs --model" in capsys.readouterr().err


def test_the_only_one_of_a_directory(file, tmp_path):
    assert is_gguf(str(tmp_path)) and find_gguf(str(tmp_path), "--model") == file
    (tmp_path / "config.json").write_text("{}")
    assert not is_gguf(str(tmp_path))


def test_hub_repository(file, monkeypatch):
    files = ["README.md", "x-Q4_0.gguf", "big/x-00001-of-00002.gguf", "big/x-00002-of-00002.gguf"]
    asked = []
    monkeypatch.setattr(find.HfApi, "list_repo_files", lambda self, repo: files)
    monkeypatch.setattr(find, "hf_hub_download", lambda repo, name: asked.append(name) or f"/hub/{name}")
    assert is_gguf("owner/x-GGUF") and not is_gguf("owner/x") and is_gguf("owner/x", "Q4_0")
    assert find_gguf("owner/x-GGUF", "--model", "q4_0") == pathlib.Path("/hub/x-Q4_0.gguf")
    assert find_gguf("owner/x-GGUF", "--model", "big/x") == pathlib.Path("/hub/big/x-00001-of-00002.gguf")
    assert asked == files[1:]
    with pytest.raises(UserError, match=r"holds 2 GGUF files; name one with --gguf: big/x-00001-of-00002.gguf, x-Q4_0"):
        find_gguf("owner/x-GGUF", "--model")


def test_hub_repository_without_network(file, tmp_path, monkeypatch):
    def no_network(*_):
        raise ConnectionError("no network")

    monkeypatch.setattr(find.HfApi, "list_repo_files", no_network)
    snapshot = tmp_path / "models--owner--x-GGUF/snapshots/0123"
    snapshot.mkdir(parents=True)
    shutil.copy(file, snapshot / "x-Q8_0.gguf")
    scan = find.scan_cache_dir
    monkeypatch.setattr(find, "scan_cache_dir", lambda: scan(tmp_path))
    monkeypatch.setattr(find, "hf_hub_download", lambda repo, name: str(snapshot / name))
    assert find_gguf("owner/x-GGUF", "--model") == snapshot / "x-Q8_0.gguf"
    with pytest.raises(UserError, match="--model owner/y-GGUF: not here, and the Hub: no network"):
        find_gguf("owner/y-GGUF", "--model")


@pytest.mark.parametrize("name", ["nowhere.gguf", "owner/nowhere.gguf/x.gguf"])
def test_no_such_file(name, file, capsys):
    assert generate(name) == 2
    assert f"--model {name}: no such file or directory" in capsys.readouterr().err
