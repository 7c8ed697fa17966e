"""From a path or a Hub id to a model, a drafter and a tokenizer."""

from __future__ import annotations

import logging
import pathlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper
from sentencepiece import SentencePieceProcessor

from mlx_redrafter.drafting.kinds import Drafter, open_drafter
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.system.files import check_safetensors, read_json
from mlx_redrafter.system.hub import fetch
from mlx_redrafter.system.openblas_layout import pack
from mlx_redrafter.system.weights import find_weights
from mlx_redrafter.target.fingerprint import difference
from mlx_redrafter.target.model import Target

EMBEDDED = pathlib.Path(__file__).parents[1] / "embedded"
DTYPES = ("float32", "float16", "bfloat16")
NO_DRAFTER = "none"
SENTENCEPIECE_PROBES = ("Hello, world", "import os\n", "a naïve café, 12345")
logger = logging.getLogger("mlx_redrafter")  # unless configured, its warnings are single lines on standard error


def load(
    path_or_repo: str | None = None,
    draft: str | None = None,
    *,
    adapter_path: str | None = None,
    dtype: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    pack_weights: bool = True,
) -> tuple[nn.Module, Drafter | None, TokenizerWrapper]:
    """Loads a target, its drafter and its tokenizer.

    Args:
        path_or_repo: directory or Hub id of an mlx-lm model; None for the embedded pair.
        draft: directory or Hub id of a drafter; "none" for no drafter. If left out, the
            embedded target comes with the embedded drafter, and any other with none.
        adapter_path: LoRA adapters, as in mlx-lm.
        dtype: "float32", "float16" or "bfloat16" for the target's unquantised weights;
            None keeps them as they are, and float32 for the embedded pair.
        tokenizer_config, trust_remote_code: as in mlx-lm.
        pack_weights: lay float32 matrices out anew where OpenBLAS multiplies them and that is faster
            (see `packing`); nowhere else does it do anything.

    Returns:
        the model (mlx-lm's, with its own code), the drafter or None, and the tokenizer.

    Raises:
        UserError: naming the file, field or flag that is wrong.
    """
    if path_or_repo is None:
        folder = EMBEDDED / "target"
        draft = str(EMBEDDED / "drafter") if draft is None else draft
        dtype = dtype or "float32"
    else:
        folder = fetch(path_or_repo, "--model")
    model, tokenizer = load_target(folder, adapter_path, dtype, tokenizer_config, trust_remote_code)
    if pack_weights:
        pack(model)
    drafter = None
    if draft is not None and draft != NO_DRAFTER:
        drafter = open_drafter(fetch(draft, "--draft"))
        target = Target.of(model)
        if not target.missing:
            check_pair(target, drafter, draft)
            check_fingerprint(target, tokenizer, drafter, draft)
            if drafter.config.quantization is None:
                drafter.set_dtype(target.dtype)
        mx.eval(drafter.parameters())
        if pack_weights:
            pack(drafter)
    return model, drafter, tokenizer


def load_target(
    folder: pathlib.Path,
    adapter_path: str | None = None,
    dtype: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    lazy: bool = False,
) -> tuple[nn.Module, TokenizerWrapper]:
    """A target and its tokenizer from a local directory; lazy leaves weights on disk until used. Raises UserError."""
    fields = check_model_directory(folder)
    if adapter_path is not None and not pathlib.Path(adapter_path).is_dir():
        raise UserError(f"--adapter-path {adapter_path}: no such directory")
    config = {"trust_remote_code": trust_remote_code, **(tokenizer_config or {})}
    try:
        model, tokenizer, *_ = mlx_lm.load(
            str(folder),
            tokenizer_config=config,
            model_config=rope_fields(fields),
            adapter_path=adapter_path,
            lazy=lazy or dtype is not None,
            **remote_code(trust_remote_code),
        )
    except Exception as error:  # whatever mlx-lm and transformers make of the files
        raise UserError(f"{folder}: mlx-lm cannot load it: {one_line(error)}") from error
    if dtype is not None:
        if dtype not in DTYPES:
            raise UserError(f"--dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        model.set_dtype(getattr(mx, dtype))
        if not lazy:
            mx.eval(model.parameters())
    check_sentencepiece(folder, tokenizer)
    return model, tokenizer


def check_fingerprint(target: Target, tokenizer: TokenizerWrapper, drafter: Drafter, name: str) -> None:
    """Warns, in one line, where the drafter's config says that it was made for another target."""
    noted = drafter.config.target_fingerprint
    if noted and (what := difference(noted, target, tokenizer)):
        logger.warning(
            "%s: made for another target than this one, %s (%s); fewer drafts will be accepted",
            name,
            noted.get("name", "of unknown name"),
            what,
        )


def check_sentencepiece(folder: pathlib.Path, tokenizer: TokenizerWrapper) -> None:
    """Warns, in one line, where a tokenizer does not read text as the tokenizer.model that it was made from."""
    if not reads_as_sentencepiece(folder, tokenizer):
        logger.warning(
            "%s: the tokenizer made from it splits text differently, or leaves out the token that texts begin with;"
            " name its tokenizer_class in tokenizer_config.json, or try `mlx-redrafter convert target`",
            folder / "tokenizer.model",
        )


def reads_as_sentencepiece(folder: pathlib.Path, tokenizer: TokenizerWrapper) -> bool:
    """False where SentencePiece's own reading of tokenizer.model, the only file there is, gives other tokens.

    The first token of texts is one of them, unless tokenizer_config.json names a class, which
    knows about it, or says itself whether there is one.
    """
    file, settings = folder / "tokenizer.model", folder / "tokenizer_config.json"
    if not file.exists() or (folder / "tokenizer.json").exists():
        return True
    try:
        processor = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError):
        return True  # another kind of file by this name, as tiktoken's
    known = read_json(settings) if settings.exists() else {}
    silent = not {"tokenizer_class", "auto_map", "add_bos_token"} & known.keys()
    first = [processor.bos_id()] if silent and processor.bos_id() >= 0 else []
    return all(
        tokenizer.encode(text, add_special_tokens=silent) == first + processor.encode(text)
        for text in SENTENCEPIECE_PROBES
    )


def remote_code(trusted: bool) -> dict[str, Any]:
    """The argument for mlx-lm's functions; 0.31 has none, and runs no code of a model's own."""
    return {"trust_remote_code": True} if trusted else {}


def rope_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The rope keys under the names that mlx-lm reads, where a config has only the newer ones.

    transformers 5 writes `rope_parameters` alone; most of mlx-lm's models know nothing of
    it and would silently take a base of 10000.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" in config:
        return {}
    fields = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if rope.get("rope_type", "default") != "default" and config.get("rope_scaling") is None:
        fields["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return fields


def check_model_directory(folder: pathlib.Path) -> dict[str, Any]:
    """The parsed config.json. Raises UserError unless it and every weight file are there and whole."""
    config = read_json(folder / "config.json")
    if "model_type" not in config:
        raise UserError(f"{folder / 'config.json'}: key 'model_type' is missing")
    files = find_weights(folder)
    if not files:
        raise UserError(f"{folder}: no model*.safetensors file")
    for file in files:
        check_safetensors(file)
    return config
