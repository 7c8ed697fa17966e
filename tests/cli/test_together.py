"""Several processes and one command. That they write one text is shown in promises/test_several_ranks.py."""

from unittest.mock import create_autospec

import pytest
from support.commands import code_of

from mlx_redrafter.cli import together
from mlx_redrafter.cli.main import parser_of_all
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.ranks import Ranks


def ranks(rank=0):
    found = create_autospec(Ranks, instance=True)
    found.size, found.rank, found.first = 2, rank, rank == 0
    return found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "sweep"], "runs in one process, found 2; several can generate, chat, serve, bench speed and train"),
        (["serve", "--prompt-cache-dir", "a"], "--prompt-cache-dir is for one process"),
        (["generate", "-p", "x", "--adapter-path", "a"], "--adapter-path is for one process"),
        (["generate", "-p", "x", "--prompt-cache-file", "a"], "--prompt-cache-file is for one process"),
        (["chat", "--record-sessions"], "--record-sessions is for one process"),
        (["generate", "-p", "-"], "--prompt - is for one process: mlx.launch"),
        (["bench", "speed", "--cost-scale", "2"], "--cost-scale 2.0 is for one process"),
    ],
)
def test_what_several_processes_cannot(words, message):
    """If this fails, processes wait for each other for ever, or write over each other's files."""
    with pytest.raises(UserError, match=message):
        together.check(parser_of_all().parse_args(words), ranks())


def test_all_see_the_same():
    """If this fails, a machine with other code or flags takes part unnoticed, or several write one file."""
    keyed = parser_of_all().parse_args(["serve", "--api-key", "secret"])
    together.check(keyed, found := ranks())
    assert "secret" not in str(found.check_same.call_args)
    for rank, out in ((0, "o"), (1, None)):
        args, found = parser_of_all().parse_args(["bench", "speed", "--out", "o", "--seed", "3"]), ranks(rank)
        together.check(args, found)
        [facts] = found.check_same.call_args.args
        assert facts["--seed"] == "3" and facts["the code of mlx-redrafter"] and facts["mlx-lm"] and args.out == out


def test_files_that_flags_name_are_compared(tmp_path):
    """If this fails, a grammar that differs between machines leaves them waiting for each other for ever."""
    seen, grammar = [], tmp_path / "grammar.lark"
    for text in ('start: "a"', 'start: "b"', None):
        grammar.unlink() if text is None else grammar.write_text(text)
        together.check(parser_of_all().parse_args(["generate", "-p", "x", "--grammar", str(grammar)]), found := ranks())
        seen.append(found.check_same.call_args.args[0])
    one, other, missing = (facts.get("the content of --grammar") for facts in seen)
    assert one and other and one != other and missing is None  # which is said later
    assert {"llguidance", "tokenizers"} <= seen[0].keys()


def test_one_process_has_no_pipeline(capsys):
    """If this fails, a flag does nothing."""
    assert code_of("generate", "-p", "x", "--pipeline") == 2
    assert "--pipeline needs several processes (mlx.launch), found one" in capsys.readouterr().err
