"""A step's tree on a terminal.

Terminals that lack our characters. Looked for: latin-1, the C locale, output into a file, every print of the tree view.
"""

import io
import os
import subprocess
import sys

import pytest

from mlx_redrafter.decoding.tree_view import drawn


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", "│  └─ 'é' ✓ accepted"), ("latin-1", "|  `- 'é' + accepted"), ("ascii", "|  `- 'é' + accepted")],
)
def test_lines_and_marks_of_the_terminal(monkeypatch, encoding, shown):
    """If this fails, a tree cannot be printed, or cannot be read, on a terminal without Unicode."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert drawn("│  └─ 'é' ✓ accepted") == shown


ENVIRONMENTS = {
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "the C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_terminal_without_unicode(name):
    """If this fails, a command ends in a traceback where the terminal lacks a character of the text."""
    code = (
        "import sys; from mlx_redrafter.cli import main as cli\n"
        "class Args:\n"
        "    command = 'generate'\n"
        "    run = staticmethod(lambda args: print('caf\\u00e9 \\u2713 \\u65e5'))\n"
        "class Parser: parse_args = staticmethod(lambda argv: Args)\n"
        "cli.parser_of_all = lambda: Parser\n"
        "sys.exit(cli.main())"
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONIOENCODING"} | ENVIRONMENTS[name]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env)
    assert ran.returncode == 0, ran.stderr
    assert rb"\u2713 \u65e5" in ran.stdout
