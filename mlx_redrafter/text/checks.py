"""Checks the files of a model before mlx-lm reads them, and says what it would read otherwise than meant.

Knows nothing of how models are loaded or what they write.
"""

from __future__ import annotations

import logging
import pathlib
import re
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from sentencepiece import SentencePieceProcessor

from mlx_redrafter.drafting import redrafter
from mlx_redrafter.drafting.cached import mtp
from mlx_redrafter.drafting.kinds import Drafter, is_eagle
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import check_readable, check_safetensors, read_json
from mlx_redrafter.system.weights import check_weights, find_weights
from mlx_redrafter.target.fingerprint import difference
from mlx_redrafter.target.model import Target

SENTENCEPIECE_PROBES = ("Hello, world", "import os\n", "a naïve café, 12345")
logger = logging.getLogger("mlx_redrafter")  # unless configured, its warnings are single lines on standard error
# What a tokenizer, its chat template and the ends of a text are read from.
TOKENIZER_FILES = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "*.tiktoken", "*.txt")
# Tokens that end a turn and nothing else: a model that ends its texts with one was tuned on chats.
_TURN_ENDS = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>"}
_TURN_ENDS |= {"<turn|>", "<|END_OF_TURN_TOKEN|>", "<|return|>", "<|endofassistant|>", "<|user|>"}
_PEFT = (
    "in PEFT's layout, and mlx-lm reads its own; merge it into its model with PEFT (merge_and_unload,"
    " save_pretrained) and give that directory as --model"
)
_CHAT_NAME = re.compile(r"(?i)(?:^|[-_./])(?:instruct|chat|it)(?:$|[-_./])")


def check_model_directory(folder: pathlib.Path) -> dict[str, Any]:
    """The parsed config.json.

    Raises:
        UserError: it, a weight file or a tokenizer's file is missing, damaged or not to be
            read; there are weight files that are no part of the model; or it is no target.
    """
    config = read_config(folder)
    if is_drafter(config):
        raise UserError(f"{folder}: is a drafter, not a target; use it with --model TARGET --draft {folder}")
    if "model_type" not in config:
        raise UserError(f"{folder / 'config.json'}: key 'model_type' is missing")
    files = find_weights(folder)
    if not files:
        torch = any(folder.glob("pytorch_model*.bin"))
        raise UserError(
            f"{folder}: no model*.safetensors file"
            + ("; `mlx-redrafter convert target` makes one of its PyTorch weights" if torch else "")
        )
    check_weights(files)
    for pattern in TOKENIZER_FILES:
        for file in folder.glob(pattern):
            check_readable(file)
    return config


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The parsed config.json of a target or a drafter. Raises UserError where there is none, or an adapter."""
    file, adapter = folder / "config.json", folder / "adapter_config.json"
    if file.exists() or not folder.is_dir():
        return read_json(file)
    if not adapter.exists():
        raise UserError(f"{file}: no such file; a model's or a drafter's directory has it beside the weights")
    if "peft_type" in read_json(adapter):
        raise UserError(f"{folder}: is an adapter {_PEFT}")
    raise UserError(f"{folder}: is an adapter; use it with --model TARGET --adapter-path {folder}")


def is_drafter(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a drafter of any kind, converted or not."""
    ours = config.get("model_type") in (redrafter.MODEL_TYPE, mtp.MODEL_TYPE)
    return ours or "medusa_num_heads" in config or is_eagle(config)


def check_adapter(folder: pathlib.Path) -> dict[str, Any]:
    """The parsed adapter_config.json.

    Raises:
        UserError: naming what is missing, damaged, or of another layout than mlx-lm's.
    """
    if not folder.is_dir():
        what = "is a file, expected a directory" if folder.exists() else "no such directory"
        raise UserError(f"--adapter-path {folder}: {what}")
    file, config = folder / "adapter_config.json", folder / "config.json"
    if not file.exists() and config.exists():
        what, flag = ("drafter", "--draft") if is_drafter(read_json(config)) else ("model", "--model")
        raise UserError(f"--adapter-path {folder}: is a {what}, not an adapter; use it with {flag} {folder}")
    fields = read_json(file)
    if "peft_type" in fields:
        raise UserError(f"--adapter-path {folder}: is {_PEFT}")
    if fields.get("fine_tune_type", "lora") != "full":
        for key, kind, what in (("num_layers", int, "a whole number"), ("lora_parameters", dict, "an object")):
            if not isinstance(fields.get(key), kind):
                raise UserError(f"{file}: {key} is {fields.get(key)!r}, expected {what}")
        if missing := sorted({"rank", "scale", "dropout"} - fields["lora_parameters"].keys()):
            raise UserError(f"{file}: lora_parameters: key {missing[0]!r} is missing")
    check_safetensors(folder / "adapters.safetensors")
    return fields


def unread_chat_template(folder: pathlib.Path) -> dict[str, Any]:
    """The chat template that transformers' tokenizers do not read, as an argument for them; {} where they find one.

    They read tokenizer_config.json (one template, or a list of named ones), chat_template.jinja and
    additional_chat_templates/. Processors keep theirs in chat_template.json or processor_config.json.

    Raises:
        UserError: a file that cannot be read, or whose template is neither text nor named texts.
    """
    if "chat_template" in _fields(folder / "tokenizer_config.json") or _jinja_files(folder):
        return {}
    for name in ("chat_template.json", "processor_config.json"):
        found = _fields(folder / name).get("chat_template")
        if isinstance(found, dict):
            found = [{"name": key, "template": value} for key, value in found.items()]
        named = isinstance(found, list) and all(isinstance(t, dict) and {"name", "template"} <= t.keys() for t in found)
        if named or isinstance(found, str):
            return {"chat_template": found}
        if found is not None:
            raise UserError(f"{folder / name}: chat_template is neither a text nor a list of named ones")
    return {}


def has_chat_template(folder: pathlib.Path) -> bool:
    """Whether a chat template lies in any of the places where they do."""
    named = {"chat_template", "chat_template_type"} & _fields(folder / "tokenizer_config.json").keys()
    return bool(named or _jinja_files(folder) or unread_chat_template(folder))


def _jinja_files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for pattern in TOKENIZER_FILES if pattern.endswith(".jinja") for path in folder.glob(pattern)]


def check_chat_template(folder: pathlib.Path, tokenizer: TokenizerWrapper) -> None:
    """Warns, in one line, where a model was tuned on chats and nothing says how they are written."""
    if tokenizer.has_chat_template:
        return
    ends = _TURN_ENDS & set(map(str, tokenizer.convert_ids_to_tokens(sorted(tokenizer.eos_token_ids))))
    if ends or _CHAT_NAME.search(folder.resolve().name) or _CHAT_NAME.search(folder.resolve().parent.parent.name):
        why = f"it ends its texts with {min(ends)}" if ends else "its name says so"
        logger.warning(
            "%s: no chat template, though the model seems to be tuned on chats (%s): prompts are given to it as they"
            " are; a chat_template.jinja beside its tokenizer would be used",
            folder,
            why,
        )


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
    file = folder / "tokenizer.model"
    if not file.exists() or (folder / "tokenizer.json").exists():
        return True
    try:
        processor = SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError):
        return True  # another kind of file by this name, as tiktoken's
    known = _fields(folder / "tokenizer_config.json")
    silent = not {"tokenizer_class", "auto_map", "add_bos_token"} & known.keys()
    first = [processor.bos_id()] if silent and processor.bos_id() >= 0 else []
    return all(
        tokenizer.encode(text, add_special_tokens=silent) == first + processor.encode(text)
        for text in SENTENCEPIECE_PROBES
    )


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


def _fields(file: pathlib.Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}
