"""Heads of any kind: read, dequantise, cast, quantise, and write in our layout."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.utils import dequantize_model
from mlx_redrafter.convert.source import TORCH_PATTERNS

from mlx_redrafter.drafting.drafter_files import check_quantization
from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.system.files import require_free, write_directory, write_json
from mlx_redrafter.system.hub import fetch
from mlx_redrafter.system.weights import save_weights, take_weights
from mlx_redrafter.target.fingerprint import fingerprint
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.loading import load_target

PATTERNS = ("config.json", "model*.safetensors", "model.safetensors.index.json", "model.pt", *TORCH_PATTERNS)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What differs from kind to kind.

    Attributes:
        read: the head, its weights lazy, from a directory and a folder for scratch files.
        quantize: a head in place, by group size and bits.
        untied: a head of the same shapes that can be held against a target without running it.
        patterns: files to fetch.
    """

    read: Callable[[pathlib.Path, pathlib.Path], Any]
    quantize: Callable[[Any, int, int], None]
    untied: Callable[[Any], Drafter]
    patterns: Sequence[str] = PATTERNS


def convert_head(
    kind: Kind,
    hf_path: str,
    mlx_path: str,
    quantize: bool = False,
    q_bits: int = 4,
    q_group_size: int = 64,
    dtype: str | None = None,
    dequantize: bool = False,
    target: str | None = None,
    trust_remote_code: bool = False,
) -> pathlib.Path:
    """Converts a checkpoint to config.json + model.safetensors that `load` reads.

    Args:
        kind: which heads; `convert_drafter` and `convert_medusa` say it.
        hf_path: local directory or Hub id, in any layout that the kind is found in, ours included.
        mlx_path: a directory that does not exist yet.
        quantize, q_bits, q_group_size: affine quantisation of all matrices; one that is
            quantised already goes through 16 bits.
        dtype: "float32", "float16" or "bfloat16"; None keeps the checkpoint's.
        dequantize: write the matrices of a quantised head in full.
        target: directory or Hub id of the target the head is for; its fingerprint is
            noted in the config. None keeps what the checkpoint's config says, if anything.
        trust_remote_code: for the target.

    Returns:
        the directory written.

    Raises:
        UserError: naming the file, key or tensor that is wrong; nothing is left behind.
    """
    require_free(mlx_path)
    if quantize:
        check_quantization(q_bits, q_group_size)
    source = fetch(hf_path, "--hf-path", patterns=list(kind.patterns))
    with write_directory(mlx_path) as folder:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            head = kind.read(source, pathlib.Path(scratch))
            if target is not None:
                head.config.target_fingerprint = _fingerprint(target, kind.untied(head), trust_remote_code)
            if head.config.quantization is not None and (quantize or dequantize):
                dequantize_model(head)
                head.config.quantization = None
            if dtype is not None:
                head.set_dtype(getattr(mx, dtype))
            if quantize:
                kind.quantize(head, q_group_size, q_bits)
            # In one file, for `load` reads one.
            save_weights(folder, take_weights(head), "writing the drafter", shard_bytes=2**62)
        write_json(folder / "config.json", head.config.to_dict())
    return pathlib.Path(mlx_path)


def _fingerprint(target: str, untied: Drafter, trust_remote_code: bool) -> dict:
    model, tokenizer = load_target(fetch(target, "--target"), trust_remote_code=trust_remote_code, lazy=True)
    found = Target.of(model)
    if not found.missing:
        check_pair(found, untied, "--hf-path")
    return fingerprint(found, tokenizer, target)
