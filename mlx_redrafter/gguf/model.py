"""From a GGUF file to an mlx-lm model directory, a tensor at a time."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections import Counter
from typing import Any

from tqdm import tqdm

from mlx_redrafter.gguf.architectures import config
from mlx_redrafter.gguf.file import read_gguf
from mlx_redrafter.gguf.outputs import Output, plan
from mlx_redrafter.gguf.tokenizer import end_tokens, write_tokenizer
from mlx_redrafter.system.weights import ITEM_BYTES, SHARD_BYTES, require_space, write_safetensors


@dataclasses.dataclass(frozen=True)
class Summary:
    """How many tensors of each type stayed as they were, and how many became numbers of `dtype`."""

    kept: Counter[str]
    changed: Counter[str]
    dtype: str

    def __str__(self) -> str:
        parts = []
        if self.kept:
            parts.append(f"{_counts(self.kept)} exactly as in the file")
        if self.changed:
            parts.append(f"{_counts(self.changed)} dequantised to {self.dtype}")
        return "; ".join(parts)


def write_model(
    path: pathlib.Path, folder: pathlib.Path, dequantize: bool = False, dtype: str | None = None
) -> Summary:
    """Writes config, weights, tokenizer and end tokens into a folder, with a progress bar.

    Args:
        path: the GGUF file, or a part of a split one.
        folder: exists; what is in it after an error is of no use.
        dequantize: write all weights as numbers.
        dtype: "float32", "float16" or "bfloat16" for numbers, scales and biases; None keeps the
            file's, and has float16 for weights that cannot stay packed.

    Raises:
        UserError: naming the file, what was found and what was expected.
        OSError: the disk is full, or will be.
    """
    file = read_gguf(path)
    fields = config(file)
    planned = plan(file, fields, dequantize, dtype)
    ends = end_tokens(file)
    fields |= {"torch_dtype": planned.dtype, "eos_token_id": ends if len(ends) != 1 else ends[0]}
    if planned.quantization is not None:
        fields |= {"quantization": planned.quantization, "quantization_config": planned.quantization}
    write_tokenizer(file, fields, folder)  # before the weights: what is wrong with it should be known soon
    _write_json(folder / "config.json", fields)
    _write_weights(folder, planned.outputs, path.name)
    return Summary(planned.kept, planned.changed, planned.dtype)


def _write_weights(folder: pathlib.Path, outputs: dict[str, Output], title: str) -> None:
    """model.safetensors, or numbered shards and their index."""
    sizes = {name: output_bytes(output) for name, output in outputs.items()}
    total = sum(sizes.values())
    require_space(folder, total)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    places: dict[str, str] = {}
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None) as bar:
        for i, names in enumerate(shards, 1):
            target = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            shapes = {name: (outputs[name].dtype, outputs[name].shape) for name in names}
            write_safetensors(folder / target, shapes, lambda name: outputs[name].read(), bar.update, "mlx")
            places |= dict.fromkeys(names, target)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        _write_json(folder / "model.safetensors.index.json", index)


def output_bytes(output: Output) -> int:
    count = ITEM_BYTES[output.dtype]
    for length in output.shape:
        count *= length
    return count


def _write_json(path: pathlib.Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())
