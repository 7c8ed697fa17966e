"""Makes rows of recorded sessions: the target answers what was asked, where its own answers are not known already.

Knows nothing of how sessions are recorded.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import replace_file
from mlx_redrafter.target.fingerprint import difference
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.sessions import files
from mlx_redrafter.training.text.answers import answers_recipe
from mlx_redrafter.training.text.data_plan import SESSIONS, DataPlan
from mlx_redrafter.training.text.formats import Question, document, question
from mlx_redrafter.training.text.rendering import Renderer
from mlx_redrafter.training.text.shards import Recipe
from mlx_redrafter.training.text.writing import Writer

COPY = "sessions.jsonl"  # in the folder of the rows: sessions go on while a run is stopped


def sessions_recipe(folder: pathlib.Path, target: Target, tokenizer: TokenizerWrapper, plan: DataPlan) -> Recipe:
    """Rows of everything that was recorded when the folder was begun.

    An answer that this target ended itself, at a temperature that it writes at here and with nothing else
    between it and its text, is taken as it was recorded.

    Raises:
        UserError: nothing usable was recorded, or as `answers_recipe`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # rows and held-out texts are conversations, too
    copy = folder / COPY
    if not copy.exists():
        lines = [json.dumps(record) + "\n" for path in files.files() for record in files.read(path)]
        if not lines:
            raise UserError(
                f"--data {SESSIONS}: nothing is recorded in {files.folder()};"
                " chat, generate and serve do so with --record-sessions"
            )
        with replace_file(copy) as file:
            file.touch(mode=0o600)
            file.write_text("".join(lines), "utf-8")
    known: dict[str, bool] = {}

    def is_own(record: dict[str, Any]) -> bool:
        noted, settings = record.get("target"), record.get("settings")
        if (key := json.dumps(noted)) not in known:
            known[key] = isinstance(noted, dict) and not difference(noted, target, tokenizer)
        plainly = isinstance(settings, dict) and settings.keys() == {"temp"} and settings["temp"] <= max(plan.temps)
        return bool(known[key] and plainly and record.get("ended"))

    questions: list[Question] = []
    for number, record in enumerate(whole(files.read(copy), is_own), 1):
        where = f"{copy} conversation {number}"
        try:
            asked = question(record, where)
            asked.answered = document(record, where) if is_own(record) else None
        except UserError:  # images, and what tools said, are no text
            continue
        questions.append(asked)
    if not questions:
        raise UserError(f"--data {SESSIONS}: none of what is recorded in {files.folder()} is a question in words")
    return answers_recipe(Writer(target.model, Renderer(tokenizer), plan), questions)


def whole(records: list[dict[str, Any]], is_own: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """One record for each conversation, with the turns that were recorded one by one, and for each text.

    Earlier answers come back with weight 0 unless they were recorded themselves and are the target's own:
    a client of the server may have said anything.
    """
    kept: dict[str, dict[str, Any]] = {}
    for record in records:
        messages = record.get("messages")
        if not isinstance(messages, list):
            kept[json.dumps(record.get("prompt"))] = record
            continue
        said = [dict(m) | ({"weight": 0} if m.get("role") == "assistant" else {}) for m in messages]
        said[-1].pop("weight", None)
        for end in range(len(messages) - 1, 0, -1):
            if (before := kept.pop(json.dumps(messages[:end]), None)) is not None:
                said[:end] = before["messages"]
                if not is_own(before):
                    said[end - 1] = said[end - 1] | {"weight": 0}
                break
        kept[json.dumps(messages)] = record | {"messages": said}
    return list(kept.values())
