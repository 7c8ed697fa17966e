"""From a GGUF file to an mlx-lm model directory, a tensor at a time."""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter

from mlx_redrafter.gguf.architectures import config
from mlx_redrafter.gguf.file import read_gguf
from mlx_redrafter.gguf.outputs import plan
from mlx_redrafter.gguf.tokenizer import end_tokens, write_tokenizer
from mlx_redrafter.system.files import write_json
from mlx_redrafter.system.weights import SHARD_BYTES, write_shards


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
    write_json(folder / "config.json", fields)
    shapes = {name: (output.dtype, output.shape) for name, output in planned.outputs.items()}
    write_shards(folder, shapes, lambda name: planned.outputs[name].read(), path.name, shard_bytes=SHARD_BYTES)
    return Summary(planned.kept, planned.changed, planned.dtype)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())
