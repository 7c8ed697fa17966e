"""`mlx-redrafter`: one command, a module per subcommand."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import NoReturn

from mlx_redrafter.errors import UserError

# Name: module with HELP, add_arguments(parser) and run(args), which may return an exit code.
COMMANDS = {
    "generate": "mlx_redrafter.cli.generate",
    "chat": "mlx_redrafter.cli.chat",
    "demo": "mlx_redrafter.cli.demo",
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
        self.exit(2, f"mlx-redrafter: error: {message} (`{self.prog} -h` lists the flags)\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code: its own, else 0; 2 for a user's mistake, 130 for Ctrl-C."""
    parser = OneLineParser(
        prog="mlx-redrafter", description="The same text from a language model, in fewer steps of it."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module_name in COMMANDS.items():
        module = importlib.import_module(module_name)
        child = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(child)
        child.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except UserError as error:
        print(f"mlx-redrafter: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
