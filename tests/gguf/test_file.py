"""What is wrong with a GGUF file is said in one line that names it, and nothing is left behind."""

from __future__ import annotations

import pathlib

import gguf
import numpy as np
import pytest
from support import gguf_files

from mlx_redrafter.errors import UserError
from mlx_redrafter.gguf import write_model
from mlx_redrafter.system.files import write_directory


@pytest.fixture(scope="module")
def model():
    return gguf_files.random_model("llama")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    return gguf_files.write_gguf("llama", model, tmp_path_factory.mktemp("whole") / "model.gguf", "Q4_0")


def refused(file: pathlib.Path, message: str) -> None:
    """That a file is refused in one line, and that nothing is left of the work."""
    target = file.parent / "out"
    with pytest.raises(UserError) as caught, write_directory(target) as folder:
        write_model(file, folder)
    text = str(caught.value)
    assert str(file.parent) in text and message in text and "\n" not in text
    assert not [path for path in file.parent.iterdir() if "out" in path.name]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not a GGUF file (is empty, expected b'GGUF')"),
        (b"PK\x03\x04 and more", r"not a GGUF file (begins with b'PK\x03\x04', expected b'GGUF')"),
        (b"GGUF\x03\0\0\0", "truncated, 8 bytes found, at least 24 expected"),
        (b"GGUF\x00\0\0\x03" + bytes(16), "a big-endian GGUF file, expected a little-endian one"),
        (b"GGUF\x01\0\0\0" + bytes(16), "GGUF version 1, expected 2 or 3"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, "truncated or damaged, its header goes beyond its 24 bytes"),
    ],
)
def test_no_gguf_file(tmp_path, content, message):
    (tmp_path / "model.gguf").write_bytes(content)
    refused(tmp_path / "model.gguf", message)


def test_big_endian_file_of_gguf_itself(model, tmp_path):
    file = gguf_files.write_gguf("llama", model, tmp_path / "model.gguf", endianess=gguf.GGUFEndian.BIG)
    refused(file, "a big-endian GGUF file")


def test_missing_file(tmp_path):
    refused(tmp_path / "model.gguf", "no such file")


@pytest.mark.parametrize(
    "share, message", [(0.999, "bytes found, "), (0.5, "truncated"), (0.01, "truncated or damaged")]
)
def test_truncated(whole, tmp_path, share, message):
    content = whole.read_bytes()
    (tmp_path / "model.gguf").write_bytes(content[: int(len(content) * share)])
    refused(tmp_path / "model.gguf", message)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"metadata": {"general.architecture": "rwkv7"}},
            "general.architecture is 'rwkv7', expected one of llama, qwen2",
        ),
        (
            {"metadata": {"general.architecture": "rwkv7", "rwkv7.expert_count": 8}},
            "general.architecture is 'rwkv7' with 8 experts, expected one of llama, qwen3moe",
        ),
        ({"metadata": {"llama.embedding_length": None}}, "key 'llama.embedding_length' is missing"),
        ({"metadata": {"llama.block_count": "two"}}, "llama.block_count is 'two', expected int"),
        ({"metadata": {"llama.attention.head_count_kv": [2, 1]}}, "head_count_kv is a list of 2, expected int"),
        ({"metadata": {"llama.attention.head_count": 0}}, "llama.attention.head_count is 0, expected at least 1"),
        ({"metadata": {"llama.rope.scaling.type": "new", "llama.rope.scaling.factor": 2.0}}, "type is 'new', expected"),
        ({"drop": ["blk.1.attn_q.weight"]}, "tensor 'blk.1.attn_q.weight' is missing"),
        ({"drop": ["token_embd.weight"]}, "tensor 'token_embd.weight' is missing"),
        ({"extra": {"blk.0.ssm_a": np.ones(3)}}, "tensor 'blk.0.ssm_a' belongs to nothing in mlx-lm's llama"),
        ({"extra": {"output_norm.weight": np.ones(32)}}, "'output_norm.weight' has the shape (32,), expected (64,)"),
        ({"extra": {"rope_freqs.weight": np.ones(3)}}, "tensor 'rope_freqs.weight' has 3 numbers, expected 8"),
        ({"metadata": {"tokenizer.ggml.pre": "klingon"}}, "tokenizer.ggml.pre is 'klingon', expected one of default"),
    ],
)
def test_no_model_of_ours(model, tmp_path, change, message):
    refused(gguf_files.write_gguf("llama", model, tmp_path / "model.gguf", **change), message)


def with_type_of_first_tensor(whole: pathlib.Path, file: pathlib.Path, code: int) -> pathlib.Path:
    content = bytearray(whole.read_bytes())
    name = b"token_embd.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8  # after the dimensions
    content[at : at + 4] = code.to_bytes(4, "little")
    file.write_bytes(content)
    return file


def test_unknown_type_of_tensor(whole, tmp_path):
    file = with_type_of_first_tensor(whole, tmp_path / "model.gguf", 99)
    refused(file, "tensor 'token_embd.weight' is of type 99, which gguf does not know")


def test_type_of_tensor_that_gguf_cannot_read(whole, tmp_path):
    file = with_type_of_first_tensor(whole, tmp_path / "model.gguf", int(gguf.GGMLQuantizationType.I8))
    refused(file, "tensor 'token_embd.weight' is of type I8, which gguf cannot read")


def test_scale_too_large_for_mlx(model, tmp_path):
    blocks = np.zeros((64, 256 // 32 * 34), np.uint8)
    blocks[:, :2] = np.frombuffer(np.array([1000.0], np.float16).tobytes(), np.uint8)
    raw = {"blk.0.ffn_down.weight": (blocks, "Q8_0")}
    refused(
        gguf_files.write_gguf("llama", model, tmp_path / "model.gguf", raw=raw),
        "tensor 'blk.0.ffn_down.weight' has a scale that MLX cannot hold; try --dequantize",
    )


def test_split_file_without_a_part(model, tmp_path):
    gguf_files.write_gguf("llama", model, tmp_path / "part.gguf", split_max_tensors=8)
    first, second, _ = sorted(tmp_path.glob("part-*.gguf"))
    second.rename(tmp_path / "hidden")
    refused(first, f"{second}: no such file")
    (tmp_path / "hidden").rename(second)
    second.write_bytes(first.read_bytes())
    refused(first, "split.no is 0, expected 1")
    first.rename(tmp_path / "alone.gguf")
    refused(tmp_path / "alone.gguf", "is one of 3 parts, expected a name like X-00001-of-00003.gguf")


def test_damage_anywhere_in_the_header_is_one_line(whole, tmp_path):
    content = whole.read_bytes()
    header = content.index(b"blk.1.ffn_down.weight") + 100
    generator = np.random.default_rng(0)
    file = tmp_path / "model.gguf"
    for i in range(60):
        damaged = bytearray(content)
        at = int(generator.integers(4, header if i % 2 else 400))
        damaged[at] = int(generator.integers(256))
        file.write_bytes(damaged)
        folder = tmp_path / f"out{i}"
        folder.mkdir()
        try:
            write_model(file, folder)
        except UserError as error:
            assert str(file) in str(error) and "\n" not in str(error)
