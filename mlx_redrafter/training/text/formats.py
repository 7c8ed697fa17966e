"""What a line of a data file says: a text, a conversation, or questions to ask."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from mlx_redrafter.errors import UserError, one_line

EXPECTED = "messages, conversations, prompt and completion, or text"
EXPECTED_PROMPTS = "turns, prompt, messages, or conversations"
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass
class Document:
    """One document: a text, or a conversation.

    Attributes:
        where: file and line, for messages to people.
        text: what is to be learned; empty for a conversation.
        prompt: what stands before the text and is not learned, None where nothing does.
        messages: of a conversation, each with role and content.
        is_start, is_end: whether the text begins, and ends, where its document does.
    """

    where: str
    text: str = ""
    prompt: str | None = None
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
    """

    where: str
    turns: list[str]
    system: str | None = None
    plain: bool = False


def document(record: Any, where: str) -> Document:
    """A record of a data file. Raises UserError where it has none of the forms that are read."""
    fields = _fields(record, where)
    if "messages" in fields:
        return Document(where, messages=_messages(fields["messages"], f"{where}: messages"))
    if "conversations" in fields:
        return Document(where, messages=_sharegpt(fields["conversations"], f"{where}: conversations"))
    if "prompt" in fields and "completion" in fields:
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return Document(where, messages=_messages([*prompt, *completion], f"{where}: prompt and completion"))
        prompt, completion = _text(prompt, f"{where}: prompt"), _text(completion, f"{where}: completion")
        return Document(where, text=completion, prompt=prompt)
    if "text" in fields:
        return Document(where, text=_text(fields["text"], f"{where}: text"))
    raise UserError(f"{where}: found the fields {_names(fields)}; expected {EXPECTED}")


def question(record: Any, where: str) -> Question:
    """A record of a file of prompts. Answers in it are left out. Raises UserError."""
    fields = _fields(record, where)
    if "turns" in fields:
        turns = fields["turns"]
        if not isinstance(turns, list) or not turns:
            raise UserError(f"{where}: turns: expected a list of texts")
        return Question(where, [_text(turn, f"{where}: turns[{i}]") for i, turn in enumerate(turns)])
    if "prompt" in fields and isinstance(fields["prompt"], str):
        return Question(where, [_text(fields["prompt"], f"{where}: prompt")], plain=True)
    for name, read in (("messages", _messages), ("prompt", _messages), ("conversations", _sharegpt)):
        if name in fields:
            messages = read(fields[name], f"{where}: {name}")
            turns = [message["content"] for message in messages if message["role"] == "user"]
            if not turns:
                raise UserError(f"{where}: {name}: no message has the role user")
            system = [message["content"] for message in messages if message["role"] == "system"]
            return Question(where, turns, "\n".join(system) or None)
    raise UserError(f"{where}: found the fields {_names(fields)}; expected {EXPECTED_PROMPTS}")


def read_questions(path: str, flag: str) -> list[Question]:
    """A file of prompts: .jsonl, .json, or text with one prompt per line.

    Raises:
        UserError: no such file, not UTF-8, broken JSON, missing fields, or nothing in it.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{flag} {path}: {'not a file' if file.exists() else 'no such file'}")
    data = read_bytes(file, path)
    if file.suffix == ".json":
        found = [question(item, f"{path} item {n}") for n, item in enumerate(parse_array(data, path), 1)]
    elif file.suffix == ".jsonl":
        found = [question(r, f"{path} line {n}") for n, _, _, r in json_lines(data.splitlines(True), path)]
    else:
        lines = decode(data, path).splitlines()
        found = [Question(f"{path} line {n}", [line], plain=True) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"{flag} {path}: empty, expected prompts")
    return found


def json_lines(lines: Iterable[bytes], label: str) -> Iterator[tuple[int, int, int, Any]]:
    """The records of a .jsonl file.

    Yields:
        its line (from 1), its first byte and the byte after its last, and the parsed record.

    Raises:
        UserError: not UTF-8, or broken JSON; naming the line.
    """
    at = 0
    for line, raw in enumerate(lines, 1):
        where = f"{label} line {line}"
        data = raw.removeprefix(_BOM) if line == 1 else raw
        if data.strip():
            try:
                yield line, at, at + len(raw), json.loads(decode(data, where))
            except ValueError as error:
                raise UserError(f"{where}: not valid JSON ({one_line(error)})") from error
        at += len(raw)


def parse_array(data: bytes, label: str) -> list[Any]:
    """The items of a .json file that holds an array. Raises UserError."""
    try:
        items = json.loads(decode(data.removeprefix(_BOM), label))
    except json.JSONDecodeError as error:
        raise UserError(f"{label} line {error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(items, list):
        raise UserError(f"{label}: found a JSON {type(items).__name__}, expected an array of records")
    return items


def read_bytes(path: pathlib.Path, label: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{label}: cannot be read ({error.strerror})") from error


def decode(data: bytes, where: str) -> str:
    """UTF-8 as text. Raises UserError naming the line of the first byte that is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = f" line {data.count(10, 0, error.start) + 1}" if " line " not in where else ""
        raise UserError(f"{where}{line}: not UTF-8 (byte 0x{data[error.start]:02x})") from error


def _fields(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: found a JSON {type(record).__name__}, expected an object")
    return {name: value for name, value in record.items() if value is not None}


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: expected a list of messages")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{where}[{i}]: expected an object with role and content")
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            content = ""
        if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            content = "".join(_text(part.get("text"), f"{where}[{i}].content") for part in content)
        messages.append(message | {"content": _text(content, f"{where}[{i}].content")})
    return messages


def _sharegpt(value: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        return _messages(value, where)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: expected a list of objects with from and value")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("from"), str):
            raise UserError(f"{where}[{i}]: expected an object with from and value")
        role = SHAREGPT_ROLES.get(message["from"], message["from"])
        messages.append({"role": role, "content": _text(message.get("value"), f"{where}[{i}].value")})
    while messages and messages[0]["role"] == "assistant":  # parts of longer conversations begin with an answer
        messages.pop(0)
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
