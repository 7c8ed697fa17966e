"""A GGUF file in the place of a model: converted once, anew when it has changed, chosen among several."""

from __future__ import annotations

import os
import pathlib
import shutil

import pytest

from mlx_redrafter import load
from mlx_redrafter.cli.main import main
from mlx_redrafter.gguf import kept
from mlx_redrafter.target.probe import is_quantized


def generate(model, *flags) -> int:
    return main(["generate", "--model", str(model), "-p", "hello", "-m", "4", "--draft", "none", *flags])


def kept_folders(tmp_path) -> list[pathlib.Path]:
    return sorted((tmp_path / "cache/mlx-redrafter/gguf").glob("*"))


def test_model_is_converted_once(file, tmp_path, capsys, monkeypatch):
    assert generate(file) == 0
    [folder] = kept_folders(tmp_path)
    first = capsys.readouterr()
    assert f"{file}: converted to {folder} (16 Q8_0, 5 F32 exactly as in the file)" in first.err
    monkeypatch.setattr(kept, "write_model", lambda *_: pytest.fail("converted twice"))
    assert generate(file) == 0
    assert capsys.readouterr().out.split("=")[0] == first.out.split("=")[0]


def test_from_python(file, tmp_path):
    """If this fails, load() refuses what --model takes."""
    for path, options in ((file, {}), (tmp_path, {"gguf": "small"})):
        model, drafter, tokenizer = load(str(path), **options)
        assert drafter is None and is_quantized(model) and tokenizer.encode("hello")
    assert len(kept_folders(tmp_path)) == 1


def test_changed_file_is_converted_anew(file, tmp_path):
    assert main(["inspect", str(file), "--bandwidth", "10"]) == 0
    before = kept_folders(tmp_path)
    os.utime(file, ns=(1, 1))
    assert main(["inspect", str(file), "--bandwidth", "10"]) == 0
    after = kept_folders(tmp_path)
    assert len(before) == len(after) == 1 and before != after


def test_another_process_was_faster(file, tmp_path, monkeypatch):
    write = kept.write_model

    def slow(path, folder, *more):
        shutil.copytree(made_by_another, kept.kept_folder(path))
        return write(path, folder, *more)

    made_by_another = tmp_path / "another"
    made_by_another.mkdir()
    write(file, made_by_another)
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


@pytest.mark.parametrize("name", ["nowhere.gguf", "owner/nowhere.gguf/x.gguf"])
def test_no_such_file(name, file, capsys):
    assert generate(name) == 2
    assert f"--model {name}: no such file or directory" in capsys.readouterr().err
