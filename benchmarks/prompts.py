"""Prompts from files: questions of MT-Bench and Spec-Bench, HumanEval's tasks, plain text and source."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.text.prompts import check_text, encode, encode_messages
from mlx_redrafter.training.text.documents import SOURCE_SUFFIXES

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Something to let a target go on from.

    Attributes:
        text: what it reads.
        category: the file's own word for the kind of task, else the file's name.
        message: whether it is to be answered (through a chat template), not continued.
    """

    text: str
    category: str
    message: bool = False


def read_prompts(paths: Sequence[str]) -> list[Prompt]:
    """All prompts of some files and of the text files below directories, in order.

    A file *.jsonl (or *.jsonl.gz) has an object per line: `turns`, of which the first is
    taken, with a `category` (MT-Bench, Spec-Bench), or `prompt` (HumanEval). Any other file
    is one prompt.

    Raises:
        UserError: naming the file, and the line in it.
    """
    prompts: list[Prompt] = []
    for name in paths:
        path = pathlib.Path(name)
        if not path.exists():
            raise UserError(f"--prompts {name}: no such file or directory")
        files = [path]
        if path.is_dir():
            files = sorted(p for s in (*SOURCE_SUFFIXES, ".jsonl", ".jsonl.gz") for p in path.rglob(f"*{s}"))
        for file in files:
            prompts += _objects(file) if file.name.endswith((".jsonl", ".jsonl.gz")) else _whole(file)
    if not prompts:
        raise UserError(f"--prompts {' '.join(paths)}: no prompts found")
    return prompts


def evenly(items: Sequence[_T], count: int) -> list[_T]:
    """`count` of them (all, where there are fewer), spread evenly, so that every category has its share."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def token_ids(prompt: Prompt, tokenizer: Any, limit: int | None, template: bool) -> list[int]:
    """A prompt as the target reads it.

    Args:
        limit: keep only so many tokens from its beginning; None keeps all.
        template: put messages through the tokenizer's chat template where it has one.
    """
    if template and prompt.message and tokenizer.chat_template is not None:
        ids = encode_messages(tokenizer, [{"role": "user", "content": prompt.text}], {})
    else:
        ids = encode(tokenizer, prompt.text)
    return ids[:limit]


def _read(file: pathlib.Path) -> str:
    try:
        raw = file.read_bytes()
        return (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {file}: not readable as text ({one_line(error)})") from error


def _whole(file: pathlib.Path) -> list[Prompt]:
    text = _read(file)
    if not text.strip():
        raise UserError(f"--prompts {file}: is empty, expected text")
    return [Prompt(text, file.name)]


def _objects(file: pathlib.Path) -> Iterator[Prompt]:
    category = file.name.partition(".")[0]
    for number, line in enumerate(_read(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"--prompts {file}: line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({one_line(error)})") from error
        if not isinstance(fields, dict):
            raise UserError(f"{where} is a JSON {type(fields).__name__}, expected an object")
        yield _prompt(fields, category, where)


def _prompt(fields: dict[str, Any], category: str, where: str) -> Prompt:
    message = "turns" in fields
    if not message and "prompt" not in fields:
        raise UserError(f"{where} has neither turns (MT-Bench, Spec-Bench) nor prompt (HumanEval)")
    value = fields["turns" if message else "prompt"]
    if message:
        value = value[0] if isinstance(value, list) and value else None
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: {'turns' if message else 'prompt'} holds no text to begin with")
    check_text(value, where)
    return Prompt(value, str(fields.get("category", category)), message)
