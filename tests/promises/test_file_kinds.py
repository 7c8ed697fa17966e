"""Every kind of unusable directory, given to every flag of every command that takes one: one line, exit code 2.

Three kinds of mistakes, with the members that were looked for:

* weights that are not one model: a copy beside the model, beside shards, a tensor in two files, shards of two
  exports without an index, a tensor that the index does not name or names in vain;
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
import pathlib
from collections.abc import Callable, Iterator

import pytest
from support.file_kinds import ADAPTER, DRAFTER, KINDS, STRANGER, TARGET

from mlx_redrafter.cli.main import COMMANDS, main
from mlx_redrafter.drafting.medusa import MedusaConfig, MedusaHeads
from mlx_redrafter.embedded.corpus import held_out_prefixes
from mlx_redrafter.text.loading import EMBEDDED

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
