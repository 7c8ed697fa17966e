"""Targets: mlx-lm's own conversion, written whole or not at all."""

from __future__ import annotations

import json
import pathlib

from mlx_lm import convert as convert_by_mlx_lm

from ..drafter import check_quantization
from ..errors import UserError
from ..files import read_json, read_safetensors, require_free, write_directory
from ..loading import check_model_directory, fetch, one_line, remote_code, rope_fields


def convert_target(
    hf_path: str,
    mlx_path: str,
    quantize: bool = False,
    q_bits: int = 4,
    q_group_size: int = 64,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> pathlib.Path:
    """Converts a Hugging Face model to an mlx-lm model.

    Args:
        hf_path: local directory or Hub id.
        mlx_path: a directory that does not exist yet.
        quantize, q_bits, q_group_size: affine quantisation, as in mlx-lm.
        dtype: of the weights that are not quantised; None keeps the model's own.

    Returns:
        the directory written.

    Raises:
        UserError: naming the file or flag that is wrong; nothing is left behind.
    """
    require_free(mlx_path)
    if quantize:
        check_quantization(q_bits, q_group_size)
    source = fetch(hf_path, "--hf-path")
    rope = rope_fields(check_model_directory(source))
    with write_directory(mlx_path) as folder:
        folder.rmdir()  # mlx-lm makes it, and refuses one that is there
        try:
            convert_by_mlx_lm(
                str(source),
                str(folder),
                quantize=quantize,
                q_bits=q_bits if quantize else None,
                q_group_size=q_group_size if quantize else None,
                dtype=dtype,
                **remote_code(trust_remote_code),
            )
        except Exception as error:  # whatever mlx-lm and transformers make of the files
            raise UserError(f"{source}: mlx-lm cannot convert it: {one_line(error)}") from error
        names = [name for file in folder.glob("*.safetensors") for name in read_safetensors(file)]
        if quantize and not any(name.endswith(".scales") for name in names):
            raise UserError(f"--q-group-size is {q_group_size}, which divides no width of {source}")
        if rope:
            file = folder / "config.json"
            file.write_text(json.dumps(read_json(file) | rope, indent=4) + "\n")
    return pathlib.Path(mlx_path)
