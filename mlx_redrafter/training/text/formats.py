"""Reads a record of a data file as a text, a conversation, or questions to ask.

Knows nothing of tokens.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from mlx_redrafter.errors import UserError
from mlx_redrafter.training.text.records import PAIRS, TEXT, kind_of, read_records, read_text

EXPECTED = "messages, conversations, instruction and output, prompt and completion, or text"
EXPECTED_PROMPTS = "turns, prompt, instruction, messages, or conversations"
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}


@dataclasses.dataclass
class Document:
    """One document: a text, or a conversation.

    Attributes:
        where: file and line, for messages to people.
        text: what is to be learned; empty for a conversation.
        prompt: what stands before the text and is not learned, None where nothing does.
        gap: what parts the prompt from the text where a model has no chat template for that.
        messages: of a conversation, each with role and content; an answer of weight 0 is not learned.
        is_start, is_end: whether the text begins, and ends, where its document does.
    """

    where: str
    text: str = ""
    prompt: str | None = None
    gap: str = ""
    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    is_start: bool = True
    is_end: bool = True

    @property
    def has_roles(self) -> bool:
        """Whether it says which part of it is an answer."""
        return bool(self.messages) or self.prompt is not None


@dataclasses.dataclass
class Question:
    """What to ask a model: the turns of one conversation.

    Attributes:
        where: file and line, for messages to people.
        turns: what the user says, in order.
        system: the system's message, if any.
        plain: a single prompt that a model without a chat template can continue as text.
        category: the file's own word for the kind of task, if any.
        answered: the same with the target's own answers, where they are known.
    """

    where: str
    turns: list[str]
    system: str | None = None
    plain: bool = False
    category: str | None = None
    answered: Document | None = None


def document(record: Any, where: str) -> Document:
    """A record of a data file. Raises UserError where it has none of the forms that are read."""
    fields = _fields(record, where)
    if "messages" in fields:
        return Document(where, messages=_messages(fields["messages"], f"{where}: messages"))
    if "conversations" in fields:
        return Document(where, messages=_messages(fields["conversations"], f"{where}: conversations", True))
    for before, after in PAIRS:
        if before in fields and after in fields:
            prompt, text = fields[before], fields[after]
            if isinstance(prompt, list) and isinstance(text, list):
                return Document(where, messages=_messages([*prompt, *text], f"{where}: {before} and {after}"))
            text, gap = _text(text, f"{where}: {after}"), "\n\n" if before == "instruction" else ""
            return Document(where, text, _asked(fields, before, where), gap)
    if "text" in fields:
        return Document(where, text=_text(fields["text"], f"{where}: text"))
    raise UserError(f"{where}: found the fields {_names(fields)}; expected {EXPECTED}")


def question(record: Any, where: str) -> Question:
    """A record of a file of prompts. Answers in it are left out. Raises UserError."""
    fields = _fields(record, where)
    category = str(fields["category"]) if "category" in fields else None
    if "turns" in fields:
        turns = fields["turns"]
        if not isinstance(turns, list) or not turns:
            raise UserError(f"{where}: turns: expected a list of texts")
        turns = [_text(turn, f"{where}: turns[{i}]") for i, turn in enumerate(turns)]
        return Question(where, turns, category=category)
    for name in ("prompt", "instruction"):
        if isinstance(fields.get(name), str):
            return Question(where, [_asked(fields, name, where)], plain=True, category=category)
    for name in ("messages", "prompt", "conversations"):
        if name in fields:
            messages = _messages(fields[name], f"{where}: {name}", sharegpt=name == "conversations")
            turns = [message["content"] for message in messages if message["role"] == "user"]
            if not turns:
                raise UserError(f"{where}: {name}: no message has the role user")
            system = [message["content"] for message in messages if message["role"] == "system"]
            return Question(where, turns, "\n".join(system) or None, category=category)
    raise UserError(f"{where}: found the fields {_names(fields)}; expected {EXPECTED_PROMPTS}")


def read_questions(path: str, flag: str, whole: bool = False) -> list[Question]:
    """A file of prompts: JSON lines, a JSON array, a CSV table, or text with one prompt per line.

    Args:
        whole: a file of text is one prompt.

    Raises:
        UserError: no such file, not UTF-8, broken JSON, missing fields, or nothing in it.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{flag} {path}: {'not a file' if file.exists() else 'no such file'}")
    if (kind := kind_of(file, path)) != TEXT:
        found = [question(record, f"{path} {kind} {n}") for n, record in read_records(file, path)]
    else:
        text = read_text(file, path).removeprefix("\ufeff")
        # Only line feeds part prompts: str.splitlines would cut at U+2028 and the like, too.
        lines = [text] if whole else [line.removesuffix("\r") for line in text.split("\n")]
        found = [Question(f"{path} line {n}", [line], plain=True) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"{flag} {path}: empty, expected prompts")
    return found


def _asked(fields: dict[str, Any], name: str, where: str) -> str:
    """A prompt; Alpaca's instruction has the input that it speaks of below it."""
    asked = _text(fields[name], f"{where}: {name}")
    if name == "instruction" and (given := _text(fields.get("input", ""), f"{where}: input")).strip():
        return f"{asked}\n\n{given}"
    return asked


def _fields(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: found a JSON {type(record).__name__}, expected an object")
    return {name: value for name, value in record.items() if value is not None}


def _messages(value: Any, where: str, sharegpt: bool = False) -> list[dict[str, Any]]:
    """The messages of a conversation; ShareGPT's, with from and value, where they are not of the usual form."""
    sharegpt = sharegpt and not (
        isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]
    )
    role_field, text_field = ("from", "value") if sharegpt else ("role", "content")
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: expected a list of {'objects with from and value' if sharegpt else 'messages'}")
    messages: list[dict[str, Any]] = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get(role_field), str):
            raise UserError(f"{where}[{i}]: expected an object with {role_field} and {text_field}")
        at, role, content = f"{where}[{i}].{text_field}", message[role_field], message.get(text_field)
        if not sharegpt:
            if content is None and message.get("tool_calls"):
                content = ""
            if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
                content = "".join(_text(part.get("text"), at) for part in content)
        said = {"role": SHAREGPT_ROLES.get(role, role) if sharegpt else role, "content": _text(content, at)}
        weight = message.get("weight")
        if weight not in (None, 0, 1):
            raise UserError(f"{where}[{i}].weight: found {json.dumps(weight)[:40]}, expected 0 or 1")
        said |= {} if weight is None else {"weight": int(weight)}  # 0: an answer that is not to be learned
        messages.append(said if sharegpt else message | said)
    while sharegpt and messages and messages[0]["role"] == "assistant":
        messages.pop(0)  # parts of longer conversations begin with an answer
    return messages


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: found {json.dumps(value)[:40]}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not valid Unicode at character {error.start}") from error
    return value


def _names(fields: dict[str, Any]) -> str:
    return ", ".join(sorted(fields)[:8]) or "(none)"
