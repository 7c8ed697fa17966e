"""Reads prompts: questions of MT-Bench and Spec-Bench, HumanEval's tasks, plain text and source.

Knows nothing of what is measured on them.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, TypeVar

from mlx_redrafter.errors import UserError
from mlx_redrafter.text.prompts import encode, encode_messages
from mlx_redrafter.training.text.documents import text_files
from mlx_redrafter.training.text.formats import read_questions
from mlx_redrafter.training.text.records import KINDS, bare_suffix

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Something to let a target go on from.

    Attributes:
        text: what it reads; of a conversation the first turn.
        category: the file's own word for the kind of task, else the file's name.
        message: whether it is to be answered (through a chat template), not continued.
        system: the system's message before it, if any.
    """

    text: str
    category: str
    message: bool = False
    system: str | None = None


def read_prompts(paths: Sequence[str]) -> list[Prompt]:
    """All prompts of some files and of the files below directories, in order.

    A file of text or source is one prompt; of any other, every record is one (see `read_questions`).
    Hidden folders, caches and packages are left out.

    Raises:
        UserError: naming the file, and the line in it.
    """
    prompts: list[Prompt] = []
    for name in paths:
        path = pathlib.Path(name)
        if not path.exists():
            raise UserError(f"--prompts {name}: no such file or directory")
        for file in sorted(text_files(path, also=(".jsonl",))) if path.is_dir() else [path]:
            for asked in read_questions(str(file), "--prompts", whole=True):
                if not asked.turns[0]:
                    raise UserError(f"--prompts {asked.where}: holds no text to begin with")
                usual = file.name.partition(".")[0] if bare_suffix(file) in KINDS else file.name
                prompts.append(Prompt(asked.turns[0], asked.category or usual, not asked.plain, asked.system))
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
        before = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
        ids = encode_messages(tokenizer, [*before, {"role": "user", "content": prompt.text}], {})
    else:
        ids = encode(tokenizer, prompt.text)
    return ids[:limit]
