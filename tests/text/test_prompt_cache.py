"""Prompt-cache files of mlx-lm and ours, and the quantised KV cache."""

import json
import pathlib
import subprocess
import sys
from unittest.mock import create_autospec

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import QuantizedKVCache, load_prompt_cache, make_prompt_cache

from mlx_redrafter import DraftShape, UserError, stream_generate
from mlx_redrafter.cli.main import main
from mlx_redrafter.decoding.sampling import position_keyed
from mlx_redrafter.text.conversation import Conversation
from mlx_redrafter.text.loading import EMBEDDED
from mlx_redrafter.text.prompt_cache import load_cache_file, save_cache_file
from mlx_redrafter.text.prompts import encode_messages

PREFIX = "import os\nimport sys\n\n\ndef read_lines(path):\n"
TARGET = str(EMBEDDED / "target")


@pytest.fixture(scope="module")
def by_mlx_lm(tmp_path_factory):
    """A file that mlx_lm.cache_prompt has written."""
    from mlx_lm import cache_prompt

    file = tmp_path_factory.mktemp("cache") / "prompt.safetensors"
    saved = sys.argv
    sys.argv = ["x", "--model", TARGET, "--prompt", PREFIX, "--prompt-cache-file", str(file)]
    try:
        cache_prompt.main()
    finally:
        sys.argv = saved
    return file


def test_written_by_mlx_lm_read_by_ours(by_mlx_lm, capsys):
    """If this fails, a cache of mlx_lm.cache_prompt cannot be used, or gives another text."""
    prompt = "    with open(path) as f:\n"
    command = ["generate", "--prompt-cache-file", str(by_mlx_lm), "-p", prompt, "-m", "30", "--json"]
    drafter = ["--draft", str(EMBEDDED / "drafter"), "--dtype", "bfloat16"]
    assert main([*command, "--model", TARGET, "--draft", "none"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, tokenizer = mlx_lm.load(TARGET)
    cache, metadata = load_prompt_cache(str(by_mlx_lm), return_metadata=True)
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = [r.token for r in mlx_lm.stream_generate(model, tokenizer, ids, max_tokens=30, prompt_cache=cache)]
    assert found["tokens"] == expected
    assert main([*command, "--model", TARGET, *drafter]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "redrafter"
    assert load_prompt_cache(str(by_mlx_lm))[0].offset == metadata.get("n", cache[0].offset - len(ids) - 30)


def test_written_by_ours_read_by_mlx_lm_and_ours(pair, tmp_path):
    """If this fails, a conversation cannot be put away and taken up again."""
    model, drafter, tokenizer = pair
    file = tmp_path / "talk.safetensors"
    first = Conversation(model, tokenizer, drafter, max_tokens=20)
    list(first.ask("import os"))
    first.save(file, TARGET)
    cache, metadata = load_prompt_cache(str(file), return_metadata=True)
    assert metadata["model"] == TARGET and json.loads(metadata["tokenizer_config"]) == {}
    more = tokenizer.encode("x = ")
    found = [r.token for r in mlx_lm.stream_generate(model, tokenizer, more, max_tokens=20, prompt_cache=cache)]
    history = json.loads(metadata["tokens"]) + more
    assert found == [r.token for r in mlx_lm.stream_generate(model, tokenizer, history, max_tokens=20)]

    second = Conversation(model, tokenizer, drafter, max_tokens=20)
    second.load(file, TARGET)
    assert second.messages == first.messages
    responses = list(second.ask("def main():"))
    assert "".join(r.text for r in responses) == "".join(r.text for r in first.ask("def main():"))
    assert responses[-1].prompt_tokens < 10  # only what is new was read


def test_a_conversation_goes_on_from_mlx_lms_file(pair, by_mlx_lm, tmp_path):
    """If this fails, what a cached prompt says is forgotten by the first message."""
    model, drafter, tokenizer = pair
    talk = Conversation(model, tokenizer, drafter, max_tokens=16)
    talk.load(by_mlx_lm, TARGET)
    held = talk._cache[0].offset
    said = [r.token for r in talk.ask("    with open(path) as f:")]
    cache = load_prompt_cache(str(by_mlx_lm))
    ids = tokenizer.encode("    with open(path) as f:\n", add_special_tokens=False)
    plain = [r.token for r in mlx_lm.stream_generate(model, tokenizer, ids, max_tokens=16, prompt_cache=cache)]
    assert said == plain
    assert talk._cache[0].offset == held + len(ids) + 16
    list(talk.ask("x = 1"))  # reads on; the cached prompt stays
    talk.messages = talk.messages[:2]
    list(talk.ask("y = 1"))
    talk.save(tmp_path / "again.safetensors", TARGET)
    again = Conversation(model, tokenizer, drafter, max_tokens=16)
    again.load(tmp_path / "again.safetensors", TARGET)
    assert [r.token for r in again.ask("z")] == [r.token for r in talk.ask("z")]


def test_a_refused_message_leaves_the_cached_prompt(pair, by_mlx_lm):
    """If this fails, the answer after a mistake knows nothing of the cached prompt."""
    model, drafter, tokenizer = pair
    talk = Conversation(model, tokenizer, drafter, max_tokens=8)
    talk.load(by_mlx_lm, TARGET)
    held = talk._cache[0].offset
    with pytest.raises(UserError, match="context"):
        list(talk.ask("x = 1\n" * 2000))
    assert talk._cache[0].offset == held == len(talk._unknown)


@pytest.mark.parametrize("message", ["use", "start", " hi ", "user"])
def test_what_stands_before_the_message_is_left_out(pair, message):
    """If this fails, a cached prompt is followed by its own header once more, or by half of it."""
    tokenizer = pair[2]
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": message}]
    ids = encode_messages(tokenizer, messages, {"chat_template": template}, after_cache=True)
    assert tokenizer.decode(ids) == f"{message.strip()}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("kind", ["missing", "truncated", "other name", "other shape", "other file", "no cache"])
def test_mistakes(pair, by_mlx_lm, tmp_path, capsys, kind, stories):
    """If this fails, a wrong file is read as if it were right, or ends in a traceback."""
    model, drafter, tokenizer = pair
    file = tmp_path / "x.safetensors"
    if kind == "truncated":
        file.write_bytes(by_mlx_lm.read_bytes()[:-50])
    elif kind in ("other name", "other shape"):
        other, _ = mlx_lm.load(str(stories))
        cache = make_prompt_cache(other)
        mx.eval(other(mx.array([[1, 2, 3]]), cache=cache))
        save_cache_file(file, cache, "somebody/else" if kind == "other name" else TARGET, {})
    elif kind == "other file":
        mx.save_safetensors(str(file), {"x": mx.zeros(3)})
    elif kind == "no cache":
        file.write_bytes(b"hello")
    message = {
        "missing": "x.safetensors: no such file",
        "truncated": "x.safetensors: truncated, ",
        "other name": "was written for model somebody/else, expected ",
        "other shape": "is of another model: has 3 layers of 4x8x8, expected 7 layers of 2x64x64",
        "other file": "not a prompt cache",
        "no cache": "not a safetensors file",
    }[kind]
    with pytest.raises(UserError, match=message):
        load_cache_file(file, model, TARGET)
    talk = Conversation(model, tokenizer, drafter, max_tokens=4)
    list(talk.ask("import os"))
    before = list(talk.messages)
    with pytest.raises(UserError):
        talk.load(file, TARGET)
    assert talk.messages == before and list(talk.ask("x"))
    assert main(["generate", "-p", "x", "--prompt-cache-file", str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("temp", [0.0, 0.7])
@pytest.mark.parametrize(
    "shape",
    [DraftShape(4, 5, 7), DraftShape(1, 4, 3), pytest.param(DraftShape(4, 5, 12, "beams"), marks=pytest.mark.slow)],
    ids=str,
)
def test_quantised_kv_cache(pair, bits, temp, shape):
    """If this fails, trees in a quantised cache are read wrongly."""
    model, drafter, tokenizer = pair
    options = {"max_tokens": 50, "kv_bits": bits, "kv_group_size": 32, "quantized_kv_start": 0}
    options["chooser"] = position_keyed(temp, 1)
    texts = []
    for used in (None, drafter):
        cache = make_prompt_cache(model)
        found = list(stream_generate(model, tokenizer, PREFIX, used, shape=shape, prompt_cache=cache, **options))
        texts.append([r.token for r in found])
        assert all(isinstance(c, QuantizedKVCache) and c.bits == bits for c in cache)
        assert cache[0].offset == found[-1].prompt_tokens + 50
        more = [r.token for r in stream_generate(model, tokenizer, "x", used, prompt_cache=cache, max_tokens=8)]
        texts[-1] += more
    assert texts[0] == texts[1]
    if temp == 0:
        sampled = mlx_lm.stream_generate(
            model, tokenizer, PREFIX, max_tokens=50, kv_bits=bits, kv_group_size=32, quantized_kv_start=0
        )
        assert texts[0][:50] == [r.token for r in sampled]


def test_quantising_begins_at_its_row(pair):
    """If this fails, --quantized-kv-start is ignored with a drafter."""
    model, drafter, tokenizer = pair
    length = len(tokenizer.encode(PREFIX))
    for start, quantised in ((length + 20, True), (length + 100, False)):
        cache = make_prompt_cache(model)
        list(
            stream_generate(
                model, tokenizer, PREFIX, drafter, max_tokens=50, prompt_cache=cache,
                kv_bits=8, kv_group_size=32, quantized_kv_start=start,
            )
        )  # fmt: skip
        assert isinstance(cache[0], QuantizedKVCache) == quantised


def test_quantised_mistakes(pair, stories_pair):
    model, drafter, tokenizer = stories_pair
    with pytest.raises(UserError, match="--kv-group-size is 64, which does not divide the head width 8"):
        list(stream_generate(model, tokenizer, "a b", drafter, kv_bits=4, quantized_kv_start=0))
    with pytest.raises(UserError, match="kv_bits is 3, expected 2, 4 or 8"):
        list(stream_generate(pair[0], pair[2], "a b", kv_bits=3))


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path):
    """If this fails, saving a conversation on a full disk costs the one that was saved before."""
    file = tmp_path / "talk.safetensors"
    file.write_bytes(b"what was there")
    program = """
import resource, sys
import mlx_redrafter, mlx.core as mx
from mlx_lm.models.cache import KVCache
from mlx_redrafter.text.prompt_cache import save_cache_file
cache = KVCache()
cache.update_and_fetch(mx.ones((1, 2, 600, 64)), mx.ones((1, 2, 600, 64)))
mx.eval(cache.state)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    save_cache_file(sys.argv[1], [cache], "x", {})
except mlx_redrafter.UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True)
    assert f"--prompt-cache-file {file}: cannot be written (" in done.stdout and done.stdout.count("\n") == 1, done
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == b"what was there"


def test_a_file_without_read_permission(small_model, tmp_path, monkeypatch):
    """If this fails, a file of another user is a traceback."""
    file = tmp_path / "talk.safetensors"
    save_cache_file(file, make_prompt_cache(small_model), "x", {})
    # The superuser may read everything, so the refusal is made.
    monkeypatch.setattr(pathlib.Path, "open", create_autospec(pathlib.Path.open, side_effect=PermissionError(13, "no")))
    with pytest.raises(UserError, match=r"talk\.safetensors: .*no"):
        load_cache_file(file, small_model, "x")
