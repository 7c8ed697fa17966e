"""`mlx-redrafter`: one command, a module per subcommand."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import sys
from importlib.metadata import version
from typing import NoReturn

from mlx_redrafter.cli import together
from mlx_redrafter.errors import UserError, one_line

# Name: module with HELP, add_arguments(parser) and run(args), which may return an exit code.
COMMANDS = {
    "generate": "mlx_redrafter.cli.generate",
    "chat": "mlx_redrafter.cli.chat",
    "serve": "mlx_redrafter.cli.serve",
    "demo": "mlx_redrafter.cli.demo",
    "sessions": "mlx_redrafter.cli.sessions",
    "bench": "mlx_redrafter.benchmarks.command",
    "train": "mlx_redrafter.training.command",
    "convert": "mlx_redrafter.convert.command",
    "inspect": "mlx_redrafter.cli.inspect",
    "tune": "mlx_redrafter.cli.tune",
    "doctor": "mlx_redrafter.doctor.command",
}


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong with a flag in one line, as for every other mistake, without the usage."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (-[^/:]+)[^:]*: is ", r"\1 is ", message)
        self.exit(2, f"mlx-redrafter: error: {message} (`{self.prog} -h` lists the flags)\n")


def parser_of_all() -> argparse.ArgumentParser:
    """The parser of every command's flags."""
    parser = OneLineParser(
        prog="mlx-redrafter", description="The same text from a language model, in fewer steps of it."
    )
    parser.add_argument("--version", action="version", version=f"mlx-redrafter {version('mlx-redrafter')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        child = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(child)
        child.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code: its own, else 0; 2 for a user's mistake, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot print a character gets its number
            stream.reconfigure(errors="backslashreplace")
    together.quiet((argv or sys.argv[1:] or [""])[0])
    args = parser_of_all().parse_args(argv)
    line, code, ranks = "", 0, None
    try:
        if (ranks := together.ranks_for(args)) is not None:
            together.check(args, ranks)
        code = args.run(args) or 0
        sys.stdout.flush()
    except UserError as error:
        line, code = str(error), 2
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of our output has seen enough
        _give_up_output()
        code = 141
    except OSError as error:  # a full disk behind the output, a file that may not be read
        line, code = f"{error.filename or 'output'}: {error.strerror or error}", 2
        if error.filename is None:
            _give_up_output()
    except Exception as error:
        if ranks is None:
            raise
        line, code = f"{type(error).__name__}: {one_line(error)}", 1
    if ranks is not None:
        together.end(ranks, line, code)
    if line:
        print(f"mlx-redrafter: error: {line}", file=sys.stderr)
    return code


def _give_up_output() -> None:
    """Lets what is still to be printed go, or Python would try once more at its end."""
    with contextlib.suppress(OSError, ValueError):  # it may be no file at all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
