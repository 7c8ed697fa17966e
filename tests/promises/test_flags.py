"""A flag means one thing, whichever command has it."""

import argparse
import collections
import importlib

import pytest

from mlx_redrafter.cli.main import COMMANDS


def plain_type(kind):
    """int, float, or None for text; a range, and "auto" beside numbers, are each command's own."""
    of = getattr(kind, "__qualname__", "").partition(".")[0]
    return {"whole": int, "number_or_auto": int, "real": float}.get(of, kind)


def flags_of(parser, command):
    """(flag, command, what its value is) of a parser and of those of its subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from flags_of(child, f"{command} {name}")
        for flag in action.option_strings:
            switch = action.nargs == 0
            kind = plain_type(action.type)
            # One name of a file is what a flag for several takes, too; of a number that is not said.
            many = "several" if action.nargs in ("+", "*") and kind is not None else "one"
            value = "no value" if switch else (kind, many, action.metavar, action.choices and tuple(action.choices))
            yield flag, command, value


def all_flags():
    found = collections.defaultdict(dict)
    for name, module in COMMANDS.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(module).add_arguments(parser)
        for flag, command, value in flags_of(parser, name):
            found[flag][command] = value
    return found


FLAGS = all_flags()


def conflicts(meanings):
    """The commands of a flag by what its value is, where that is not the same in all. A metavar may be left out."""
    by_value = collections.defaultdict(list)
    for command, value in meanings.items():
        by_value[value].append(command)
    kinds = {value if isinstance(value, str) else (*value[:2], value[3]) for value in by_value}
    named = {value[2] for value in by_value if not isinstance(value, str)} - {None}
    return dict(by_value) if len(kinds) > 1 or len(named) > 1 else {}


@pytest.mark.parametrize("flag", sorted(flag for flag, meanings in FLAGS.items() if len(meanings) > 1))
def test_a_flag_means_one_thing(flag):
    """If this fails, a flag that works in one command is refused, or read as something else, in another."""
    assert conflicts(FLAGS[flag]) == {}


def test_such_a_pair_is_seen():
    """If this fails, the test above sees nothing."""
    assert conflicts({"demo": (int, "one", None, None), "bench": (None, "one", "PATH", None)})
    assert conflicts({"tune": "no value", "doctor": (None, "one", "FILE", None)})
    assert conflicts({"bench": (int, "several", "M", None), "train": (int, "one", None, None)})
    assert not conflicts({"bench": (int, "one", None, None), "train": (int, "one", "N", None)})
