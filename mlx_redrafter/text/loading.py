"""From a name, a path or a Hub id to a model, a drafter and a tokenizer.

Knows nothing of prompts and texts.
"""

from __future__ import annotations

import pathlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_adapters, load_model, load_tokenizer

from mlx_redrafter.drafting.cached.draft_model import DraftModel
from mlx_redrafter.drafting.cached.mtp_weights import read_layer
from mlx_redrafter.drafting.drafter_files import read_fields
from mlx_redrafter.drafting.kinds import Drafter, open_drafter
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.embedded import assistant
from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.gguf import as_directory, is_gguf
from mlx_redrafter.system.device import on_cpu, stalling
from mlx_redrafter.system.files import read_json
from mlx_redrafter.system.hub import fetch, snapshot_of
from mlx_redrafter.system.openblas_layout import pack
from mlx_redrafter.system.ranks import all_ranks
from mlx_redrafter.system.weights import digests
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.splitting import divide
from mlx_redrafter.text.checks import (
    check_adapter,
    check_chat_template,
    check_fingerprint,
    check_model_directory,
    check_sentencepiece,
    is_drafter,
    logger,
    read_config,
    rope_fields,
    unread_chat_template,
)

EMBEDDED = pathlib.Path(__file__).parents[1] / "embedded"
DTYPES = ("float32", "float16", "bfloat16")
EMBEDDED_PAIR, ASSISTANT, NO_DRAFTER, MTP = "embedded", "assistant", "none", "mtp"  # what may stand for a path


def load(
    path_or_repo: str | None = None,
    draft: str | None = None,
    *,
    gguf: str | None = None,
    adapter_path: str | None = None,
    dtype: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    pack_weights: bool = True,
    split: str | None = None,
) -> tuple[nn.Module, Drafter | None, TokenizerWrapper]:
    """Loads a target, its drafter and its tokenizer.

    Args:
        path_or_repo: directory or Hub id of an mlx-lm model, or a GGUF file, which is converted once into the
            cache directory; "assistant" for SmolLM2-135M-Instruct, where it is installed; None or
            "embedded" for the embedded pair. A directory of such a name is "./assistant".
        draft: directory or Hub id of a drafter, or of a small mlx-lm model with the same tokenizer, or a
            GGUF file of one; "mtp" for the target's own multi-token-prediction layer, where its directory
            has one; "none" for no drafter. If left out, the assistant and the embedded target come with
            their own, which these names stand for, too, and any other target with none.
        gguf: which GGUF file, by its name or a part of it, where path_or_repo has several.
        adapter_path: LoRA adapters, as in mlx-lm.
        dtype: "float32", "float16" or "bfloat16" for the target's unquantised weights;
            None keeps them as they are, and float32 for the embedded pair.
        tokenizer_config, trust_remote_code: as in mlx-lm.
        pack_weights: lay float32 matrices out anew where OpenBLAS multiplies them and that is faster
            (see `openblas_layout`); nowhere else does it do anything.
        split: "tensor" or "pipeline", where several processes (mlx.launch) are to have a part of the target each: of
            every layer, or some layers. All have to call this, and have the same files.

    Returns:
        the model (mlx-lm's, with its own code), the drafter or None, and the tokenizer.

    Raises:
        UserError: naming the file, field or flag that is wrong.
    """
    folder = find_target(path_or_repo, "--model", gguf)
    if is_embedded(path_or_repo):
        dtype = dtype or "float32"
    if said := stalling():
        logger.warning("%s", said)
    if draft is None:
        draft = str(own_drafter(path_or_repo) or NO_DRAFTER)
    if split is not None:
        if adapter_path is not None:
            raise UserError(f"--adapter-path {adapter_path}: is for a target in one process")
        apart = draft not in (NO_DRAFTER, MTP)
        all_ranks().check_same(digests(folder) | (digests(find_drafter(draft)) if apart else {}))
    drafter = None if draft == NO_DRAFTER else open_draft(draft, folder)
    model, tokenizer = load_target(folder, adapter_path, dtype, tokenizer_config, trust_remote_code, split is not None)
    if pack_weights and split is None:
        pack(model)
    if drafter is not None:  # compared with the whole target
        fit_drafter(drafter, model, tokenizer, draft, pack_weights)
    if split is not None:
        divide(model, split, path_or_repo or EMBEDDED_PAIR)
    return model, drafter, tokenizer


def is_embedded(name: str | None) -> bool:
    """Whether a target's name means the embedded one, which continues Python and knows nothing of conversations."""
    return name in (None, EMBEDDED_PAIR)


def place_of(name: str | None, flag: str, gguf: str | None = None) -> str:
    """A directory or Hub id of a target from its name, for those who keep it: that of a GGUF file is its conversion.

    Args:
        name: as for `load`.
        flag: what the user typed it for, for messages.

    Raises:
        UserError: the assistant is not installed, or a GGUF file cannot be found or read.
    """
    if gguf is not None and (name == ASSISTANT or is_embedded(name)):
        raise UserError(f"--gguf {gguf} needs {flag}, a directory or Hub repository that has it")
    if name is None or name == EMBEDDED_PAIR:
        return str(EMBEDDED / "target")
    if name == ASSISTANT:
        return str(assistant.target_folder())
    return as_directory(name, flag, gguf)


def find_target(name: str | None, flag: str, gguf: str | None = None) -> pathlib.Path:
    """The directory of a target. Raises UserError where there is none, see `place_of` and `fetch`."""
    return fetch(place_of(name, flag, gguf), flag)


def own_drafter(target: str | None) -> pathlib.Path | None:
    """The directory of the drafter that comes with a target of this name; None where none does."""
    if target == ASSISTANT:
        return assistant.drafter_folder()
    return EMBEDDED / "drafter" if is_embedded(target) else None


def find_drafter(name: str, flag: str = "--draft") -> pathlib.Path:
    """The directory of a drafter from its name, as for `load`. Raises UserError where there is none."""
    if name in (ASSISTANT, EMBEDDED_PAIR):
        if (folder := own_drafter(name)) is None:
            raise UserError(f"{flag} {name}: this installation of mlx-redrafter has no drafter for the assistant")
        return folder
    if is_gguf(name):
        if flag != "--draft":
            raise UserError(f"{flag} {name}: is a GGUF file, a model, not a drafter; use it with --model {name}")
        return pathlib.Path(as_directory(name, flag))
    return fetch(name, flag)


def open_draft(name: str, target: pathlib.Path) -> Drafter:
    """A drafter, or a small model, from its name as for `load`, for the target in a directory. Raises UserError."""
    if name == MTP:
        fields = read_config(target)
        return read_layer(target, fields | rope_fields(fields))
    place = find_drafter(name)
    if is_drafter(read_fields(place)):
        return open_drafter(place)
    model, tokenizer = load_target(place, lazy=True)
    return DraftModel(model, tokenizer, read_json(place / "config.json").get("quantization"))


def fit_drafter(drafter: Drafter, model: nn.Module, tokenizer: Any, name: str, pack_weights: bool = True) -> None:
    """Readies an opened drafter for a loaded target: their types of weights agree, and what they share is shared.

    Args:
        name: of the drafter, for messages.

    Raises:
        UserError: it was made for a target of another shape.
    """
    target = Target.of(model)
    if isinstance(drafter, DraftModel):
        drafter.fit(target, tokenizer, name)
    if not target.missing:
        check_pair(target, drafter, name)
        check_fingerprint(target, tokenizer, drafter, name)
        if on_cpu() and target.dtype == mx.float32:  # there, quantised products take each row by itself
            drafter.dequantize()
        if drafter.config.quantization is None:
            drafter.set_dtype(target.dtype)
    mx.eval(drafter.parameters())
    if pack_weights:
        pack(drafter)


def load_target(
    folder: pathlib.Path,
    adapter_path: str | None = None,
    dtype: str | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    lazy: bool = False,
) -> tuple[nn.Module, TokenizerWrapper]:
    """A target and its tokenizer from a local directory; lazy leaves weights on disk until used. Raises UserError."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    adapter = None
    if adapter_path is not None:
        check_adapter(adapter := snapshot_of(pathlib.Path(adapter_path).expanduser()))
    model, config = open_model(folder, trust_remote_code)
    if adapter is not None:
        try:
            model = load_adapters(model, str(adapter))
        except Exception as error:  # whatever mlx-lm makes of the files
            raise UserError(f"--adapter-path {adapter}: does not fit {folder}: {one_line(error)}") from error
        model.eval()
    tokenizer = open_tokenizer(folder, config, {"trust_remote_code": trust_remote_code, **(tokenizer_config or {})})
    if dtype is not None:
        model.set_dtype(getattr(mx, dtype))
    if not lazy:
        mx.eval(model.parameters())
    check_sentencepiece(folder, tokenizer)
    check_chat_template(folder, tokenizer)
    return model, tokenizer


def open_model(folder: pathlib.Path, trust_remote_code: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model of a directory, its weights lazy, and its config as mlx-lm read it. Raises UserError."""
    fields = check_model_directory(folder)
    try:
        return load_model(folder, lazy=True, model_config=rope_fields(fields), **remote_code(trust_remote_code))
    except Exception as error:  # whatever mlx-lm makes of the files
        raise UserError(f"{folder}: mlx-lm cannot load it: {one_line(error)}") from error


def open_tokenizer(
    folder: pathlib.Path, config: dict[str, Any], settings: dict[str, Any], name: pathlib.Path | None = None
) -> TokenizerWrapper:
    """The tokenizer of a directory, with its chat template wherever that lies.

    Args:
        config: the model's, for the tokens that end a text.
        settings: arguments for transformers' tokenizer.
        name: the directory in messages, if it is another.

    Raises:
        UserError: there is no tokenizer, or none that can be read.
    """
    settings = unread_chat_template(folder) | settings
    try:
        return load_tokenizer(folder, settings, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # whatever transformers makes of the files
        what = "mlx-lm cannot load it: no tokenizer that transformers can read"
        raise UserError(f"{name or folder}: {what}: {one_line(error)}") from error


def remote_code(trusted: bool) -> dict[str, Any]:
    """The argument for mlx-lm's functions; 0.31 has none, and runs no code of a model's own."""
    return {"trust_remote_code": True} if trusted else {}
