"""Drafters of any kind: read, dequantise, cast, quantise, and write in our layout, or in the published one."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_redrafter.convert import eagle, medusa, redrafter
from mlx_redrafter.convert.source import TORCH_PATTERNS
from mlx_redrafter.convert.vocabulary import with_most_frequent

from mlx_redrafter.drafting.cached import mtp
from mlx_redrafter.drafting.cached.mtp_weights import places
from mlx_redrafter.drafting.drafter_files import check_quantization, read_fields
from mlx_redrafter.drafting.kinds import Drafter, is_eagle, open_drafter
from mlx_redrafter.drafting.pairing import check_sizes
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import require_free, write_directory, write_json
from mlx_redrafter.system.hub import fetch
from mlx_redrafter.system.weights import save_weights, take_weights
from mlx_redrafter.target.fingerprint import fingerprint
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.checks import is_drafter
from mlx_redrafter.text.loading import MTP, find_target, load_target, open_draft

_INDEX = "model.safetensors.index.json"
_PATTERNS = ["config.json", "model*.safetensors", _INDEX]
_ONE_FILE = 2**62  # bytes of a shard: `load` reads one


def _kind(fields: dict[str, Any]) -> Any:
    """The module that reads drafters with such a config.json."""
    if "medusa_num_heads" in fields:
        return medusa
    return eagle if is_eagle(fields) else redrafter


def read_drafter(folder: pathlib.Path, scratch: pathlib.Path) -> Drafter:
    """A drafter of lazy weights, published or ours. Raises UserError; `scratch` as for `lazy_weights`."""
    fields = read_fields(folder)
    if "model_type" in fields and not is_drafter(fields):
        return open_draft(MTP, folder)
    if fields.get("model_type") == mtp.MODEL_TYPE:
        return open_drafter(folder)
    drafter: Drafter = _kind(fields).read(folder, scratch)
    return drafter


def _fetch_layer(hf_path: str) -> pathlib.Path:
    """A model's directory with the files of its multi-token-prediction layer, of a repository with these alone."""
    folder, files = fetch(hf_path, "--hf-path", ["config.json", _INDEX]), {"model.safetensors"}
    if (folder / _INDEX).exists():
        files = set(places(folder).values())
    folder = fetch(hf_path, "--hf-path", ["config.json", _INDEX, *sorted(files)])
    if not places(folder):
        raise UserError(
            f"{hf_path}: is a model without a multi-token-prediction layer, not a drafter; use `mlx-redrafter convert"
            " target`"
        )
    return folder


def convert_drafter(
    hf_path: str,
    mlx_path: str,
    quantize: bool = False,
    q_bits: int = 4,
    q_group_size: int = 64,
    dtype: str | None = None,
    dequantize: bool = False,
    target: str | None = None,
    trust_remote_code: bool = False,
    draft_vocab_size: int | None = None,
    count: Callable[[int], np.ndarray] | None = None,
) -> pathlib.Path:
    """Converts a checkpoint to config.json + model.safetensors that `load` reads.

    Args:
        hf_path: local directory or Hub id: Apple's ReDrafter, published Medusa or EAGLE-3 heads, a model
            with a multi-token-prediction layer, or any of them in our layout.
        mlx_path: a directory that does not exist yet.
        quantize, q_bits, q_group_size: affine quantisation of all matrices; one that is
            quantised already goes through 16 bits.
        dtype: of the weights that are not quantised; None keeps the checkpoint's.
        dequantize: write the matrices of a quantised drafter in full.
        target: of the target that it is for, as for `load`; its fingerprint is noted in the
            config. None keeps what the checkpoint's config says, if anything.
        trust_remote_code: for the target.
        draft_vocab_size: tokens that can be drafted, where they are to be fewer: the most frequent ones.
        count: tells how often each of so many tokens is found in text.

    Returns:
        the directory written.

    Raises:
        UserError: naming the file, key or tensor that is wrong; nothing is left behind.
    """
    require_free(mlx_path)
    if quantize:
        check_quantization(q_bits, q_group_size)
    fields = read_fields(fetch(hf_path, "--hf-path", ["config.json"]))
    if "model_type" in fields and not is_drafter(fields):
        source = _fetch_layer(hf_path)
    else:
        names = medusa.WEIGHT_FILES if "medusa_num_heads" in fields else ("model.pt", *TORCH_PATTERNS)
        source = fetch(hf_path, "--hf-path", [*_PATTERNS, *names])
    with write_directory(mlx_path) as folder:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            drafter = read_drafter(source, pathlib.Path(scratch))
            if target is not None:
                drafter.config.target_fingerprint = _fingerprint(target, drafter, trust_remote_code)
            if draft_vocab_size is not None and count is not None:
                counts = count(drafter.config.vocab_size)
                drafter = with_most_frequent(drafter, counts, draft_vocab_size, hf_path)
            if quantize or dequantize:
                drafter.dequantize()
            if dtype is not None:
                drafter.set_dtype(getattr(mx, dtype))
            if quantize:
                drafter.quantize(q_group_size, q_bits)
            save_weights(folder, take_weights(drafter), "writing the drafter", shard_bytes=_ONE_FILE)
        write_json(folder / "config.json", drafter.config.to_dict())
    return pathlib.Path(mlx_path)


def export_drafter(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes a drafter under the names of Apple or Medusa, in full. Raises UserError where they have no form for it."""
    fields = read_fields(source)
    kind, is_layer = _kind(fields), fields.get("model_type") == mtp.MODEL_TYPE
    if kind is eagle or is_layer:
        what = "a multi-token-prediction layer" if is_layer else "an EAGLE-3 head"
        raise UserError(f"{source}: is {what}, which is not exported; use the checkpoint that it was made of")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        drafter: Any = read_drafter(source, pathlib.Path(scratch))
        for field in ("draft_vocab_size", "context_layers", "prefix_window", "output_norm", "tie_output"):
            if value := getattr(drafter.config, field, None):
                raise UserError(f"{source}: {field} is {value}, for which this layout has no form")
        drafter.dequantize()
        fields, weights = kind.published_form(drafter)
        take_weights(drafter)
        save_weights(folder, weights, "writing the drafter", kind="pt", shard_bytes=_ONE_FILE)
    if kind is medusa:
        (folder / "model.safetensors").rename(folder / medusa.WEIGHT_FILES[0])
    write_json(folder / "config.json", fields)


def _fingerprint(target: str, drafter: Drafter, trust_remote_code: bool) -> dict[str, Any]:
    model, tokenizer = load_target(find_target(target, "--target"), trust_remote_code=trust_remote_code, lazy=True)
    found = Target.of(model)
    if not found.missing:
        check_sizes(found, drafter, "--hf-path")
    return fingerprint(found, tokenizer, target)
