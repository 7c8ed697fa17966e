"""Converting drafters and targets from files as they are found."""

import json
import pathlib
import pickle
import shutil

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_redrafter.convert.drafter import convert_drafter
from mlx_redrafter.convert.redrafter import published_form
from mlx_redrafter.convert.target import convert_target
from support import make_drafter
from support.commands import code_of

from mlx_redrafter import UserError, load
from mlx_redrafter.cli.main import main
from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.redrafter import DrafterConfig, RecurrentDrafter
from mlx_redrafter.text.checks import rope_fields
from mlx_redrafter.text.loading import EMBEDDED

NAMINGS = {
    "lm_head": lambda name: name,
    "lm_heads": lambda name: name.replace("lm_head.", "lm_heads.").replace("input_proj.", "input_projs."),
    "nested": lambda name: name.replace("lm_head.", "lm_heads.0.").replace("input_proj.", "input_projs.0."),
    "plain": lambda name: name.replace("lm_head.", "0."),
}


def write_checkpoint(folder, drafter, naming="lm_head", file="model.safetensors", **config_changes):
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"num_lookback_tokens": 1, **drafter.config.to_dict(), **config_changes}
    (folder / "config.json").write_text(json.dumps(fields))
    weights = {NAMINGS[naming](name): value for name, value in published_form(drafter)[1].items()}
    if file.endswith(".safetensors"):
        mx.save_safetensors(str(folder / file), weights)
    else:
        torch = pytest.importorskip("torch")
        import numpy as np

        torch.save({name: torch.from_numpy(np.array(value)) for name, value in weights.items()}, folder / file)
    return folder


def same(a, b):
    pairs = zip(tree_flatten(a.parameters()), tree_flatten(b.parameters()), strict=True)
    return all(n == m and mx.array_equal(x, y) for (n, x), (m, y) in pairs)


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("shape", [{}, {"exit_dim": 64}, {"rnn": False, "num_draft_layers": 0}])
def test_namings(tmp_path, naming, shape):
    """If this fails, published drafters of one kind cannot be read, or read into the wrong places."""
    drafter = make_drafter(**shape)
    source = write_checkpoint(tmp_path / "hf", drafter, naming)
    convert_drafter(str(source), str(tmp_path / "mlx"))
    assert same(open_drafter(tmp_path / "mlx"), drafter)


@pytest.mark.parametrize("file", ["model.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_files(tmp_path, file, dtype):
    torch = pytest.importorskip("torch")
    drafter = make_drafter()
    drafter.set_dtype(getattr(mx, dtype))
    weights = {}
    for name, value in published_form(drafter)[1].items():
        weights[name] = torch.tensor(value.astype(mx.float32).tolist(), dtype=getattr(torch, dtype))
    source = tmp_path / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(drafter.config.to_dict()))
    torch.save(weights, source / file)
    convert_drafter(str(source), str(tmp_path / "mlx"))
    assert same(open_drafter(tmp_path / "mlx"), drafter)


def test_export_is_the_way_back(tmp_path):
    """If this fails, input_proj's halves are joined or split in the wrong order."""
    drafter = make_drafter()
    joined = published_form(drafter)[1]["input_proj.weight"]
    assert joined.shape == (32, 64)
    assert mx.array_equal(joined[:, :32], drafter.input_proj_context.weight)
    assert mx.array_equal(joined[:, 32:], drafter.input_proj_state.weight)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_shards(tmp_path, file):
    """If this fails, a drafter in shards is read in part, or not at all."""
    drafter = make_drafter()
    whole = write_checkpoint(tmp_path / "whole", drafter, file=file)
    source = tmp_path / "hf"
    source.mkdir()
    shutil.copy(whole / "config.json", source)
    stem, suffix = file.rsplit(".", 1)
    if suffix == "safetensors":
        weights, save = mx.load(str(whole / file)), lambda path, part: mx.save_safetensors(str(path), part)
    else:
        torch = pytest.importorskip("torch")
        weights, save = torch.load(whole / file), lambda path, part: torch.save(part, path)
    weight_map, names = {}, sorted(weights)
    for i in range(3):
        name = f"{stem}-{i + 1:05d}-of-00003.{suffix}"
        save(source / name, {n: weights[n] for n in names[i::3]})
        weight_map |= dict.fromkeys(names[i::3], name)
    (source / f"{file}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert_drafter(str(source), str(tmp_path / "mlx"))
    assert same(open_drafter(tmp_path / "mlx"), drafter)
    (source / name).unlink()
    with pytest.raises(UserError, match=f"{name}: no such file, though {file}.index.json names it"):
        convert_drafter(str(source), str(tmp_path / "again"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [{}, {"exit_dim": 64}, {"rnn": False, "num_draft_layers": 0}])
def test_export_and_back(tmp_path, shape, dtype):
    """If this fails, a drafter that was trained here cannot be given back, or changes by it."""
    drafter = make_drafter(**shape)
    drafter.set_dtype(getattr(mx, dtype))
    drafter.config.target_fingerprint = {"name": "x"}
    apple = write_checkpoint(tmp_path / "apple", drafter)
    mlx, back, again = (tmp_path / name for name in ("mlx", "back", "again"))
    convert_drafter(str(apple), str(mlx))
    assert main(["convert", "export", "--mlx-path", str(mlx), "--hf-path", str(back)]) == 0
    given, found = (mx.load(str(folder / "model.safetensors")) for folder in (apple, back))
    assert given.keys() == found.keys()
    assert all(given[n].dtype == found[n].dtype and mx.array_equal(given[n], found[n]) for n in given)
    assert json.loads((apple / "config.json").read_text()) == json.loads((back / "config.json").read_text())
    convert_drafter(str(back), str(again))
    assert same(open_drafter(again), drafter)


def test_quantised_again(tmp_path, capsys):
    """If this fails, a drafter in 8 bits cannot become one in 4, or becomes nonsense."""
    drafter = make_drafter(hidden=64, vocab=128, exit_dim=64)
    drafter.set_dtype(mx.bfloat16)
    source = write_checkpoint(tmp_path / "hf", drafter)

    def converted(hf, name, *flags):
        flags = ["--hf-path", str(hf), "--mlx-path", str(tmp_path / name), *flags]
        assert main(["convert", "drafter", *flags]) == 0
        return open_drafter(tmp_path / name)

    eight = converted(source, "8", "-q", "--q-bits", "8", "--q-group-size", "32")
    four = converted(tmp_path / "8", "4", "-q", "--q-bits", "4", "--q-group-size", "64")
    full = converted(tmp_path / "8", "full", "-d")
    assert (eight.lm_head.bits, four.lm_head.bits, full.config.quantization) == (8, 4, None)
    assert four.config.quantization == {"group_size": 64, "bits": 4}
    given = drafter.lm_head.weight
    layer = four.lm_head
    found = mx.dequantize(layer.weight, layer.scales, layer.biases, 64, 4)
    for value, most in ((full.lm_head.weight, 0.02), (found, 0.2)):
        assert value.dtype == mx.bfloat16
        assert 0 < (mx.abs(value - given).mean() / mx.abs(given).mean()).item() < most
    assert same(converted(tmp_path / "4", "copy"), four)
    capsys.readouterr()
    assert main(["convert", "export", "--mlx-path", str(tmp_path / "4"), "--hf-path", str(tmp_path / "x")]) == 2
    assert "is quantised" in capsys.readouterr().err
    assert main(["convert", "export", "--mlx-path", str(tmp_path / "8"), "--hf-path", str(tmp_path / "x"), "-d"]) == 0
    assert mx.array_equal(mx.load(str(tmp_path / "x/model.safetensors"))["lm_head.2.weight"], full.lm_head.weight)


def test_heads_that_apple_has_not_are_kept(tmp_path, capsys):
    """If this fails, converting a drafter of a reduced vocabulary, several layers or a tied output layer loses them."""
    shapes: list[dict] = [{"draft_vocab_size": 10}, {"context_layers": (1, 4)}, {"tie_output": True}]
    for i, shape in enumerate(shapes):
        drafter = make_drafter(**shape, seed=i) if "tie_output" not in shape else make_tied()
        drafter.save(tmp_path / f"{i}")
        convert_drafter(str(tmp_path / f"{i}"), str(tmp_path / f"{i}-copy"), dtype="float16")
        found = open_drafter(tmp_path / f"{i}-copy")
        drafter.set_dtype(mx.float16)
        assert found.config == drafter.config and same(found, drafter)
        apple = tmp_path / f"{i}-apple"
        assert code_of("convert", "export", "--mlx-path", str(tmp_path / f"{i}"), "--hf-path", str(apple)) == 2
        assert not apple.exists()
        assert f"{next(iter(shape))} is {next(iter(shape.values()))}, for which" in capsys.readouterr().err


def make_tied():
    return RecurrentDrafter(DrafterConfig(97, 32, 32, 2, tie_output=True))


def test_quantised_and_cast(tmp_path, capsys):
    drafter = make_drafter(hidden=64, vocab=128, exit_dim=64)
    source = write_checkpoint(tmp_path / "hf", drafter)
    flags = ["--hf-path", str(source), "--mlx-path"]
    assert main(["convert", "drafter", *flags, str(tmp_path / "q"), "-q", "--q-bits", "8", "--q-group-size", "32"]) == 0
    assert "hidden size 64 and vocabulary 128" in capsys.readouterr().out
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 8}
    assert open_drafter(tmp_path / "q").lm_head.bits == 8
    assert main(["convert", "drafter", *flags, str(tmp_path / "h"), "--dtype", "float16"]) == 0
    assert open_drafter(tmp_path / "h").lm_head.weight.dtype == mx.float16


class Dangerous:
    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("executed"),))


def test_a_pickle_with_more_than_tensors_is_not_run(tmp_path, monkeypatch, capsys):
    """If this fails, opening a downloaded drafter can run its author's code."""
    pytest.importorskip("torch")
    import torch

    monkeypatch.chdir(tmp_path)
    source = write_checkpoint(tmp_path / "hf", make_drafter())
    (source / "model.safetensors").unlink()
    for content in ({"lm_head.0.weight": Dangerous()}, [torch.zeros(3)]):
        torch.save(content, source / "pytorch_model.bin")
        assert main(["convert", "drafter", "--hf-path", str(source), "--mlx-path", str(tmp_path / "mlx")]) == 2
        err = capsys.readouterr().err
        assert "pytorch_model.bin: holds something other than" in err and err.count("\n") == 1
    with (source / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"x": Dangerous()}, file)
    assert main(["convert", "drafter", "--hf-path", str(source), "--mlx-path", str(tmp_path / "mlx")]) == 2
    assert not (tmp_path / "executed").exists() and not (tmp_path / "mlx").exists()


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda s: (s / "model.safetensors").unlink(), "no weights; expected model.safetensors, model.pt"),
        (lambda s: (s / "config.json").unlink(), "config.json: no such file"),
        (lambda s: (s / "model.safetensors").write_bytes(b"x" * 50), "not a safetensors file"),
        (
            lambda s: write_checkpoint(s, make_drafter(), num_draft_layers=3),
            "comes after 2 blocks.*num_draft_layers is 3",
        ),
        (
            lambda s: write_checkpoint(s, make_drafter(), exit_dim=40),
            r"'input_proj.bias' has shape \(32,\), expected \(40,\)",
        ),
        (lambda s: mx.save_safetensors(str(s / "model.safetensors"), {"a.b": mx.zeros(2)}), "tensor 'a.b' does not"),
    ],
)
def test_damaged_checkpoints(tmp_path, damage, message):
    """If this fails, a damaged checkpoint ends in a traceback or leaves half a directory."""
    source = write_checkpoint(tmp_path / "hf", make_drafter())
    damage(source)
    with pytest.raises(UserError, match=message):
        convert_drafter(str(source), str(tmp_path / "mlx"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_nothing_is_overwritten(tmp_path):
    """If this fails, a typing mistake in --mlx-path costs somebody their files."""
    source = write_checkpoint(tmp_path / "hf", make_drafter())
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "precious").write_text("x")
    for convert in (convert_drafter, convert_target):
        with pytest.raises(UserError, match="already exists"):
            convert(str(source), str(tmp_path / "mlx"))
    assert (tmp_path / "mlx" / "precious").read_text() == "x"


def test_an_unconverted_drafter_says_what_to_do(tmp_path):
    source = write_checkpoint(tmp_path / "hf", make_drafter())
    with pytest.raises(UserError, match="run `mlx-redrafter convert drafter`"):
        open_drafter(source)


def test_target(tmp_path, capsys):
    """If this fails, `convert target` does not give a model that `load` reads."""
    flags = ["--hf-path", str(EMBEDDED / "target"), "--mlx-path"]
    assert main(["convert", "target", *flags, str(tmp_path / "q"), "-q", "--q-bits", "4", "--q-group-size", "32"]) == 0
    model, drafter, tokenizer = load(str(tmp_path / "q"))
    assert drafter is None and model.model.embed_tokens.bits == 4
    assert tokenizer.encode("import os") == load(draft="none")[2].encode("import os")
    assert main(["convert", "target", *flags, str(tmp_path / "h"), "--dtype", "float16"]) == 0
    assert load(str(tmp_path / "h"))[0].model.embed_tokens.weight.dtype == mx.float16
    capsys.readouterr()
    assert main(["convert", "target", *flags, str(tmp_path / "x"), "-q", "--q-group-size", "7"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h", "q"]


def test_rope_of_newer_configs(tmp_path):
    """If this fails, a model saved by transformers 5 is loaded with wrong positions, and says so nowhere."""
    rope = {"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}
    source = tmp_path / "hf"
    shutil.copytree(EMBEDDED / "target", source)
    fields = json.loads((source / "config.json").read_text()) | {"rope_parameters": rope}
    (source / "config.json").write_text(json.dumps(fields))
    convert_target(str(source), str(tmp_path / "mlx"), dtype="float32")
    for folder in (source, tmp_path / "mlx"):
        found = load(str(folder))[0].layers[0].self_attn.rope
        assert (found.base, found.scale) == (500.0, 0.5)
    # mlx-lm alone reads the converted model right, too.
    assert mlx_lm.load(str(tmp_path / "mlx"))[0].args.rope_theta == 500.0
    assert rope_fields({"rope_theta": 1.0, "rope_parameters": rope}) == {} == rope_fields({})
