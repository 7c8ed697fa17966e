"""Converting whole models: from PyTorch files and back, from shards, quantised again, in little memory."""

import json
import pathlib
import shutil
import subprocess
import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_redrafter.convert.target import convert_target
from support.vicuna import TEXT, tensors, write_vicuna

from mlx_redrafter import UserError, load
from mlx_redrafter.cli.main import main
from mlx_redrafter.text.loading import EMBEDDED


def equal(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and mx.array_equal(a[n], b[n]) for n in a)


def converted(source, out, *flags):
    assert main(["convert", "target", "--hf-path", str(source), "--mlx-path", str(out), *flags]) == 0
    return out


@pytest.mark.parametrize("files", ["whole", "shards", "old format"])
def test_stories_from_pytorch_and_back(stories, tmp_path, files):
    """If this fails, models that come as PyTorch files cannot be used, or change on the way."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    source = tmp_path / "hf"
    shutil.copytree(stories, source, ignore=shutil.ignore_patterns("*.safetensors"))
    state = {n: torch.tensor(np.array(v)) for n, v in tensors(stories).items()}
    if files == "shards":
        weight_map, names = {}, sorted(state)
        for i in range(2):
            part, name = names[i::2], f"pytorch_model-{i + 1:05d}-of-00002.bin"
            torch.save({n: state[n] for n in part}, source / name)
            weight_map |= dict.fromkeys(part, name)
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=files == "whole")
    mlx = converted(source, tmp_path / "mlx")
    assert equal(tensors(mlx), tensors(stories))
    model, _, tokenizer = load(str(mlx))
    expected, expected_tokenizer = mlx_lm.load(str(stories))
    prompt = "Once upon a time"
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=20) == mlx_lm.generate(
        expected, expected_tokenizer, prompt, max_tokens=20
    )
    if files == "whole":
        back = tmp_path / "back"
        assert main(["convert", "export", "--mlx-path", str(mlx), "--hf-path", str(back)]) == 0
        assert equal(tensors(back), tensors(stories))
        ids = torch.tensor([tokenizer.encode(prompt)])
        theirs, ours = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (stories, back))
        assert torch.equal(theirs, ours)
        assert (back / "tokenizer.json").exists()


def test_vicuna_shaped_shards(vicuna, tmp_path, capsys, caplog):
    """If this fails, a model in shards with nothing but tokenizer.model loses tensors, or splits text wrongly."""
    import sentencepiece

    out = converted(vicuna, tmp_path / "mlx")
    assert "use it with --model" in capsys.readouterr().out
    assert equal(tensors(out), tensors(vicuna))
    _, _, tokenizer = load(str(out))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(vicuna / "tokenizer.model"))
    assert tokenizer.encode(TEXT) == [processor.bos_id(), *processor.encode(TEXT)]
    assert tokenizer.decode(processor.encode(TEXT)) == TEXT
    assert "splits text differently" not in caplog.text
    # Unconverted, it can be loaded, and says what is wrong with it.
    load(str(vicuna))
    assert [r.getMessage() for r in caplog.records if "splits text differently" in r.getMessage()]


def test_quantised_again(vicuna, tmp_path, capsys):
    """If this fails, a model that is quantised already cannot be made smaller, or keeps two quantisations."""
    flags = ["--q-group-size", "32"]
    eight = converted(vicuna, tmp_path / "8", "-q", "--q-bits", "8", *flags)
    four = converted(eight, tmp_path / "4", "-q", "--q-bits", "4", *flags)
    found, direct = (json.loads((p / "config.json").read_text())["quantization"] for p in (four, eight))
    assert (found["bits"], direct["bits"]) == (4, 8)
    layer = load(str(four))[0].layers[0].self_attn.q_proj
    assert layer.bits == 4
    full = converted(eight, tmp_path / "full", "-d")
    name = "model.layers.0.self_attn.q_proj.weight"
    for folder, most in ((full, 0.01), (four, 0.15)):
        value = (
            tensors(full)[name] if folder is full else mx.dequantize(layer.weight, layer.scales, layer.biases, 32, 4)
        )
        error = mx.abs(value - tensors(vicuna)[name]).mean() / mx.abs(tensors(vicuna)[name]).mean()
        assert 0 < error.item() < most
    assert "quantization" not in json.loads((full / "config.json").read_text())
    mxfp4 = converted(vicuna, tmp_path / "mxfp4", "-q", "--q-mode", "mxfp4")
    assert load(str(mxfp4))[0].layers[0].mlp.up_proj.mode == "mxfp4"
    mixed = converted(vicuna, tmp_path / "mixed", "-q", "--quant-predicate", "mixed_4_6", *flags)
    assert load(str(mixed))[0].lm_head.bits == 6
    capsys.readouterr()
    assert main(["convert", "export", "--mlx-path", str(four), "--hf-path", str(tmp_path / "x")]) == 2
    assert "--dequantize writes it in full" in capsys.readouterr().err
    pytest.importorskip("torch")
    assert main(["convert", "export", "--mlx-path", str(eight), "--hf-path", str(tmp_path / "x"), "-d"]) == 0
    assert equal(tensors(tmp_path / "x"), tensors(full))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["-q", "-d"], "expected at most one"),
        (["--q-bits", "8"], "--q-bits needs --quantize"),
        (["-q", "--q-mode", "mxfp4", "--q-bits", "4"], "--q-bits goes with --q-mode affine"),
        (["--q-mode", "mxfp4"], "--q-mode mxfp4 needs --quantize"),
        (["--upload-repo", "me"], "--upload-repo is 'me', expected owner/name"),
    ],
)
def test_flags_that_do_not_go_together(vicuna, tmp_path, capsys, flags, message):
    assert main(["convert", "target", "--hf-path", str(vicuna), "--mlx-path", str(tmp_path / "x"), *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_full_disk(tmp_path, capsys, monkeypatch):
    """If this fails, a full disk that can be foreseen ends in a traceback or in half a model."""
    monkeypatch.setattr(
        "mlx_redrafter.system.weights.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40, 0)
    )
    assert main(["convert", "target", "--hf-path", str(EMBEDDED / "target"), "--mlx-path", str(tmp_path / "mlx")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'mlx'}: cannot be written" in line and "0.03 GB are needed, 0.00 GB are free" in line
    assert not list(tmp_path.iterdir())


def test_a_full_disk_in_the_middle(vicuna, tmp_path, capsys, monkeypatch):
    """As above where it cannot be foreseen: the real writer, a file that takes no more."""
    import errno

    opened = pathlib.Path.open

    def open_small(path, *args, **kwargs):
        file = opened(path, *args, **kwargs)
        if args == ("wb",) and path.name == "model.safetensors":
            written = 0

            def write(data):
                nonlocal written
                written += len(data)
                if written > 50_000:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return len(data)

            return _Small(file, write)
        return file

    monkeypatch.setattr(pathlib.Path, "open", open_small)
    assert main(["convert", "target", "--hf-path", str(vicuna), "--mlx-path", str(tmp_path / "mlx")]) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


class _Small:
    def __init__(self, file, write):
        self.file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()


# Linux's high-water mark of resident memory, set back before each conversion. getrusage's
# cannot be set back, and begins with what the parent process has had.
MEASURE = """
import pathlib, re, sys
import mlx_redrafter, torch
from mlx_redrafter.convert.export import _check_layout
from mlx_redrafter.convert.target import convert_target
warm, out, *sources = sys.argv[1:]
status = pathlib.Path("/proc/self/status")
resident = lambda word: int(re.search(word + r":\\s+(\\d+) kB", status.read_text())[1]) * 1024
torch.load(pathlib.Path(warm) / "warm.bin", weights_only=True)
convert_target(warm, out + "/warm", quantize=True)
for i, source in enumerate(sources):
    for quantize in (False, True):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        convert_target(source, f"{out}/{i}{quantize}", quantize=quantize)
        print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory(sentencepiece_model, vicuna, tmp_path):
    """If this fails, a conversion needs more memory than the largest shard and a fifth."""
    torch = pytest.importorskip("torch")
    shape = {"hidden": 768, "layers": 6, "inner": 3072}
    source = write_vicuna(tmp_path / "hf", sentencepiece_model, **shape)
    shards = sorted(source.glob("*.safetensors"))
    largest = max(shard.stat().st_size for shard in shards)
    files = tmp_path / "torch"
    shutil.copytree(source, files, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    for shard in shards:
        name = shard.name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        torch.save({n: torch.from_numpy(np.array(v)) for n, v in mx.load(str(shard)).items()}, files / name)
    warm = tmp_path / "warm"
    shutil.copytree(vicuna, warm)
    torch.save({"x": torch.zeros(2)}, warm / "warm.bin")
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", MEASURE, str(warm), str(tmp_path / "out"), str(source), str(files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = [int(line) for line in done.stdout.split() if line.isdigit()]
    print(f"largest shard {largest / 1e6:.1f} MB; conversions {[round(u / 1e6, 1) for u in used]} MB")
    assert largest > 30e6 and len(used) == 4 and max(used) <= 1.2 * largest


def test_errors_of_python_callers(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        convert_target(str(tmp_path / "none"), str(tmp_path / "out"))
