"""Directories that are no target, no drafter or no adapter, each in its own way, and what is said of them."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable

import mlx.core as mx

from mlx_redrafter.text.loading import EMBEDDED
from support import DATA

TARGET, DRAFTER, ADAPTER = "target", "drafter", "adapter"
STRANGER = "a model with another tokenizer"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 9\n"
PAGE = "\n<!DOCTYPE html>\n<html><head><title>Hugging Face</title></head></html>"


def link(name: str, folder: pathlib.Path, damage: Callable[[pathlib.Path], object] = lambda f: None) -> None:
    """A copy of one of the embedded pair that can be damaged; its weights are a link."""
    shutil.copytree(EMBEDDED / name, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.safetensors").symlink_to(EMBEDDED / name / "model.safetensors")
    damage(folder)


def instead(name: str, text: str) -> Callable[[pathlib.Path], None]:
    """Damage: another text in a file's place."""

    def damage(folder: pathlib.Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(text)

    return damage


def locked(name: str) -> Callable[[pathlib.Path], None]:
    """Damage: a file that nobody may read."""

    def damage(folder: pathlib.Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).write_bytes(whole[:4096])
        (folder / name).chmod(0)

    return damage


def beside(name: str) -> Callable[[pathlib.Path], None]:
    return lambda folder: (folder / name).symlink_to(folder / "model.safetensors")


def tiny(folder: pathlib.Path, **files: list[str]) -> None:
    """Weight files with these tensors in place of the model's."""
    (folder / "model.safetensors").unlink()
    for stem, names in files.items():
        arrays = {name: mx.zeros((2, 2)) for name in names}
        mx.save_safetensors(str(folder / f"{stem.replace('_', '-')}.safetensors"), arrays)


def index(folder: pathlib.Path, **places: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def two_files(folder: pathlib.Path) -> None:
    tiny(folder, model_a=["a", "b"], model_b=["b"])


def two_exports(folder: pathlib.Path) -> None:
    tiny(folder, model_00001_of_00001=["a"], model_00001_of_00002=["a"], model_00002_of_00002=["b"])


def beside_shards(folder: pathlib.Path) -> None:
    tiny(folder, model_00001_of_00001=["a"], model_old=["a"])
    index(folder, a="model-00001-of-00001.safetensors")


def unnamed(folder: pathlib.Path) -> None:
    tiny(folder, model=["a", "b"])
    index(folder, a="model.safetensors")


def named_in_vain(folder: pathlib.Path) -> None:
    tiny(folder, model=["a"])
    index(folder, a="model.safetensors", b="model.safetensors")


def adapter(folder: pathlib.Path, **changes: object) -> None:
    folder.mkdir()
    settings = {"rank": 2, "scale": 1.0, "dropout": 0.0}
    fields = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": settings} | changes
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    mx.save_safetensors(str(folder / "adapters.safetensors"), {"x.lora_a": mx.zeros((2, 2))})


Maker = Callable[[pathlib.Path], object]

COPIES = ("model-old", "model.backup", "model copy", "model-fp16", "model_2")
FOREIGN = {
    f"{what} as {name}": (instead(name, text), f"{name}: is a {say}")
    for what, text, say in (("pointer", POINTER, "Git LFS pointer"), ("page", PAGE, "web page"))
    for name in ("model.safetensors", "config.json", "tokenizer.json")
}

KINDS: dict[str, dict[str, tuple[Maker, str]]] = {
    TARGET: {
        **{
            f"{copy} beside it": (lambda f, copy=copy: link(TARGET, f, beside(f"{copy}.safetensors")), copy)
            for copy in COPIES
        },
        "a tensor in two files": (
            lambda f: link(TARGET, f, two_files),
            "model-b.safetensors: tensor 'b' is in model-a",
        ),
        "two exports": (lambda f: link(TARGET, f, two_exports), "of-00002.safetensors: is there"),
        "a copy beside shards": (lambda f: link(TARGET, f, beside_shards), "model-old.safetensors: is there"),
        "an index that lacks a tensor": (lambda f: link(TARGET, f, unnamed), "tensor 'b' is there, but"),
        "an index of another model": (lambda f: link(TARGET, f, named_in_vain), "tensor 'b' is missing, though"),
        **{name: (lambda f, damage=damage: link(TARGET, f, damage), says) for name, (damage, says) in FOREIGN.items()},
        **{
            f"{name} may not be read": (lambda f, name=name: link(TARGET, f, locked(name)), f"{name}: may not be read")
            for name in ("config.json", "model.safetensors", "tokenizer.json")
        },
        "a drafter": (lambda f: link(DRAFTER, f), "is a drafter"),
        "an adapter": (adapter, "is an adapter"),
        "PEFT's layout": (lambda f: adapter(f, peft_type="LORA"), "in PEFT's layout"),
        "nothing": (lambda f: f.mkdir(), "config.json: no such file"),
    },
    DRAFTER: {
        **{
            name: (lambda f, damage=damage: link(DRAFTER, f, damage), says)
            for name, (damage, says) in FOREIGN.items()
            if "tokenizer" not in name
        },
        **{
            f"{name} may not be read": (lambda f, name=name: link(DRAFTER, f, locked(name)), f"{name}: may not be read")
            for name in ("config.json", "model.safetensors")
        },
        "a target": (lambda f: link(TARGET, f), "model"),
        STRANGER: (lambda f: shutil.copytree(DATA / "tiny", f), "model"),
        "an adapter": (adapter, "is an adapter"),
        "a GGUF file": (lambda f: (f.mkdir(), (f / "m.gguf").touch()), "GGUF"),
        "nothing": (lambda f: f.mkdir(), "config.json: no such file"),
    },
    ADAPTER: {
        "PEFT's layout": (lambda f: adapter(f, peft_type="LORA", lora_alpha=8), "PEFT"),
        "no num_layers": (lambda f: adapter(f, num_layers=None), "adapter_config.json: num_layers is None"),
        "no scale": (lambda f: adapter(f, lora_parameters={"rank": 2, "dropout": 0}), "key 'scale' is missing"),
        "another model's": (adapter, "--adapter-path"),
        **{
            f"{what} as {name}": (lambda f, n=name, t=text: (adapter(f), instead(n, t)(f)), f"{name}: is a ")
            for what, text in (("pointer", POINTER), ("page", PAGE))
            for name in ("adapter_config.json", "adapters.safetensors")
        },
        **{
            f"{name} may not be read": (lambda f, n=name: (adapter(f), locked(n)(f)), f"{name}: may not be read")
            for name in ("adapter_config.json", "adapters.safetensors")
        },
        "a target": (lambda f: link(TARGET, f), "is a model, not an adapter; use it with --model"),
        "a drafter": (lambda f: link(DRAFTER, f), "is a drafter, not an adapter; use it with --draft"),
    },
}
