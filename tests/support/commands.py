"""Commands as a shell sees them."""

from mlx_redrafter.cli.main import main


def code_of(*words):
    """The exit code of a command, that of flags which argparse refuses too."""
    try:
        return main(list(words))
    except SystemExit as stopped:
        return stopped.code
