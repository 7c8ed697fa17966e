"""The command: it starts, says so, and ends; what it cannot do it says in one line."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import mlx_lm.server
import pytest
from support.commands import code_of
from support.serving import TINY

from mlx_redrafter.cli import serve


def test_it_starts_serves_and_ends():
    """If this fails, a service manager cannot run it."""
    command = [sys.executable, "-m", "mlx_redrafter.cli.main", "serve", "--port", "0", *TINY, "--num-draft-tokens", "3"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        line = process.stdout.readline()
        url = line.split()[-1]
        with urllib.request.urlopen(f"{url}/v1/models") as answer:
            assert json.load(answer)["data"][0]["id"] == "tiny"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--model", "/nowhere"), "--model /nowhere: no such directory"),
        ((*TINY, "--draft", "/nowhere"), "--draft /nowhere: no such directory"),
        ((*TINY, "--beam-width", "0"), "--beam-width is 0"),
        ((*TINY, "--host", "nowhere.invalid"), "--host nowhere.invalid --port 8080: "),
        ((*TINY, "--chat-template-args", "[]"), "is a JSON list, expected an object"),
        ((*TINY, "--max-body-bytes", "much"), "--max-body-bytes is 'much', expected a size like 500MB or 4G"),
        ((*TINY, "--use-default-chat-template"), "this tokenizer has no chat template"),
    ],
)
def test_what_it_cannot_do(capsys, flags, words):
    assert code_of("serve", *flags) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert code_of("serve", *TINY, "--port", port) == 2
    assert f"--host 127.0.0.1 --port {port}: " in capsys.readouterr().err


def test_all_flags_of_mlx_lms_server(monkeypatch):
    """If this fails, whoever replaces mlx_lm.server by this command has to change the flags."""

    class Seen(Exception):
        pass

    def parse(parser, *_):
        raise Seen({flag for action in parser._actions for flag in action.option_strings})

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Seen) as seen:
        mlx_lm.server.main()
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    assert seen.value.args[0] <= set(parser._option_string_actions)
