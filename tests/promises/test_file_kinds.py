"""Every kind of unusable directory, given to every flag of every command that takes one: one line, exit code 2.

Four kinds of mistakes, with the members that were looked for:

* weights that are not one model: a copy beside the model, beside shards, a tensor in two files, shards of two
  exports without an index, a tensor that the index does not name or names in vain;
* chat templates in all places where they live, in test_chat_templates below;
* files that may not be read: weights, config, tokenizer, adapter_config, adapters, a drafter's weights and config;
* files that stand for others: Git LFS pointers and web pages as weights, config, tokenizer or adapters;

and what is whole but something else: a drafter or an adapter as --model; a model with another tokenizer as --draft, and
any model where only a drafter will do; an adapter or an empty GGUF file as either;
a model, a drafter or PEFT's layout as --adapter-path. The table is made from the commands' own parsers, so a new
command joins it by itself.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator

import mlx.core as mx
import pytest
from support import DATA

from mlx_redrafter.cli.main import COMMANDS, main
from mlx_redrafter.drafting.medusa import MedusaConfig, MedusaHeads
from mlx_redrafter.embedded.corpus import held_out_prefixes
from mlx_redrafter.text.loading import EMBEDDED

TARGET, DRAFTER, ADAPTER = "target", "drafter", "adapter"
STRANGER = "a model with another tokenizer"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 9\n"
PAGE = "\n<!DOCTYPE html>\n<html><head><title>Hugging Face</title></head></html>"
# What a flag that takes a directory expects, by the flag; by the command where one flag means two things.
EXPECTED = {
    "model": TARGET,
    "draft": DRAFTER,
    "init": DRAFTER,
    "medusa": DRAFTER,
    "draft_model": TARGET,
    "adapter_path": ADAPTER,
    "target": TARGET,
    "path": TARGET,
    ("convert target", "hf_path"): TARGET,
    ("convert drafter", "hf_path"): DRAFTER,
    ("convert export", "mlx_path"): TARGET,
    ("convert medusa-tree", "mlx_path"): DRAFTER,
}
OTHERS = {"prompt": "x", "max_tokens": "1"}  # required flags that take no directory to read
PROMPTS = functools.cache(held_out_prefixes)
IGNORED = {"upload_repo", "data", "text", "prompts", "report", "resume", "prompt_cache_dir"}


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


def leaves(argv: list[str], parser: argparse.ArgumentParser) -> Iterator[tuple[list[str], list[argparse.Action]]]:
    """Every command with its subcommands' names, and its flags."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield argv, [action for action in parser._actions if action.nargs != 0]
    for action in below:
        for name, child in action.choices.items():
            yield from leaves([*argv, name], child)


@functools.cache
def commands() -> list[tuple[list[str], list[argparse.Action]]]:
    found = []
    for name, module in COMMANDS.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(module).add_arguments(parser)
        found += leaves([name], parser)
    return found


def reads(argv: list[str], action: argparse.Action) -> str | None:
    """What a flag expects in the directory that it names; None if it names none to read."""
    return EXPECTED.get((" ".join(argv), action.dest)) or EXPECTED.get(action.dest)


def table() -> Iterator[tuple[list[str], argparse.Action, str, str]]:
    """Every command with every kind; the kinds of bench, which read their flags in one place, share the table."""
    benches = [argv for argv, _ in commands() if argv[0] == "bench"]
    for argv, actions in commands():
        for action in actions:
            if (kind := reads(argv, action)) is not None:
                for i, name in enumerate(KINDS[kind]):
                    if (action.dest == "draft" and name == "a target") or (action.dest != "draft" and name == STRANGER):
                        continue  # a model with the target's tokenizer drafts; where none does, all are alike
                    if argv not in benches or benches.index(argv) == i % len(benches):
                        yield argv, action, kind, name


def call(argv: list[str], action: argparse.Action, folder: pathlib.Path, tmp_path: pathlib.Path) -> list[str]:
    """The command line that gives a directory to a flag, and to every other required flag what it takes."""
    [actions] = [actions for each, actions in commands() if each == argv]
    line = list(argv)
    for other in actions:
        value: str | None = None
        if other is action or other.dest == action.dest:
            value = str(folder)
        elif argv == ["convert", "medusa-tree"] and other.dest == "mlx_path":
            MedusaHeads(MedusaConfig(97, 32, 2)).save(tmp_path.parent / "heads")
            value = str(tmp_path.parent / "heads")
        elif other.required and (kind := reads(argv, other)) is not None:
            value = str(EMBEDDED / kind)
        elif argv[0] == "bench" and other.dest == "prompts":
            value = __file__
        elif other.dest == "port":
            value = "0"  # any free one
        elif other.required:
            value = OTHERS.get(other.dest, str(tmp_path / "new"))
        if value is not None:
            line += [*other.option_strings[:1], value]
    return line


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Callable[[str, str], pathlib.Path]:
    """A directory of each kind, made once."""
    made: dict[tuple[str, str], pathlib.Path] = {}

    def folder(kind: str, name: str) -> pathlib.Path:
        if (kind, name) not in made:
            made[kind, name] = tmp_path_factory.mktemp("kinds") / "it"
            KINDS[kind][name][0](made[kind, name])
        return made[kind, name]

    return folder


@pytest.fixture(autouse=True)
def without_what_takes_long(monkeypatch):
    """What commands do before they look at a directory: the standard library is read once, and nothing is freed."""
    monkeypatch.setattr("mlx_redrafter.benchmarks.flags.held_out_prefixes", PROMPTS)
    monkeypatch.setattr("mlx_redrafter.doctor.command.active_memory", lambda: 0)


@pytest.mark.parametrize(
    ("argv", "action", "kind", "name"),
    [pytest.param(*row, id=f"{' '.join(row[0])} {row[1].dest}: {row[3]}") for row in table()],
)
def test_every_kind_of_file_and_command(argv, action, kind, name, folders, tmp_path, capsys, without_privileges):
    """If this fails, a command answers a wrong directory with a traceback, or not at all, or after the work."""
    folder = folders(kind, name)
    code = main(call(argv, action, folder, tmp_path))
    out, err = capsys.readouterr()
    if argv == ["convert", "export"] and name == "a drafter":  # which it takes
        assert code == 0
        return
    if argv == ["inspect"]:  # its answer is what a directory is and what it lacks
        assert (code == 0 and name in ("a drafter", "an adapter")) or KINDS[kind][name][1] in out, out
        return
    assert code == 2 and "Traceback" not in err, (code, out, err)
    lines = [line for line in err.splitlines() if line.startswith("mlx-redrafter: error: ")]
    assert len(lines) == 1 and KINDS[kind][name][1] in lines[0], err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_all_flags_for_directories_are_in_the_table():
    """If this fails, a flag that reads a directory is in no table: name what it expects in EXPECTED."""
    unknown = {
        f"{' '.join(argv)} {action.dest}"
        for argv, actions in commands()
        for action in actions
        if any(word in (action.help or "") for word in ("directory", "Hub id"))
        and "must not exist yet" not in (action.help or "")
        and reads(argv, action) is None
        and action.dest not in IGNORED | {"out", "work"}
    }
    assert not unknown
