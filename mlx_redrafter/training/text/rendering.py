"""Turns documents into tokens and marks the ones that are to be learned.

Knows nothing of files and rows.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.errors import UserError
from mlx_redrafter.text.prompts import render
from mlx_redrafter.training.text.formats import Document
from mlx_redrafter.training.text.shards import Marked
from mlx_redrafter.tuning import store

_MARK = "<what the user says>"


def digest(facts: Any) -> str:
    """A short name for something that JSON can hold."""
    return store.digest(json.dumps(facts).encode())


class Renderer:
    """What a tokenizer and its chat template make of documents.

    Attributes:
        ends: token ids that end a text or an answer.
        has_template: whether there is a chat template.
    """

    def __init__(self, tokenizer: TokenizerWrapper):
        self._tokenizer = tokenizer
        self.ends: frozenset[int] = frozenset(tokenizer.eos_token_ids)
        self.has_template: bool = tokenizer.has_chat_template

    def fingerprint(self) -> str:
        """A short name for the tokenizer: changes with its vocabulary, template, ends, or way of cutting a text."""
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        cut = self.encode("def f(x):\n  # Ünï\n")
        return digest([vocabulary, str(self._tokenizer.chat_template), sorted(self.ends), cut])

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of plain text; `special` adds what the tokenizer puts around texts."""
        return list(self._tokenizer.encode(text, add_special_tokens=special, verbose=False))  # long texts are expected

    def decode(self, tokens: list[int]) -> str:
        """An answer as text, special tokens left out."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def first_token(self) -> int:
        """What a text begins with, as far as the tokenizer says."""
        candidates = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, 0)
        return next(int(token) for token in candidates if token is not None)

    def text(self, document: Document) -> Marked:
        """A plain text, or a prompt and its completion as text, closed by the end-of-text token.

        All of a text is to be learned but its first token, and of a completion nothing
        before it. A piece of a longer text has a beginning and an end only where the text has.
        """
        before = self.encode(document.prompt + document.gap) if document.prompt else []
        ids = before + self.encode(document.text, special=document.is_start and not before)
        end = self._tokenizer.eos_token_id
        if document.is_end and end is not None and (not ids or ids[-1] != end):
            ids = [*ids, end]
        counts = np.ones(len(ids), bool)
        counts[: max(1, len(before))] = False
        return ids, counts

    def question(self, messages: list[dict[str, Any]], where: str) -> list[int]:
        """A conversation up to where the assistant is to answer. Raises UserError."""
        return self.encode(self._render(messages, where, ask=True), special=False)

    def conversation(self, messages: list[dict[str, Any]], where: str) -> list[Marked]:
        """A conversation with the assistant's tokens marked, each answer's end included.

        The marks are found by rendering beginnings of the conversation, so any template
        will do under which a beginning renders as the beginning of the whole. Where it does
        not, the template's own marks are used, if it has them; else the conversation comes
        back once for each answer, cut after it and with that answer marked alone (templates
        that leave the thoughts out of earlier answers need that). Answers of weight 0 stay
        unmarked; where all are, nothing comes back.

        Raises:
            UserError: no chat template, one that fails, or no answer that could be marked.
        """
        spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not spoken:
            raise UserError(f"{where}: no message has the role assistant")
        answers = [i for i in spoken if messages[i].get("weight") != 0]
        if not answers:
            return []
        messages = messages[: answers[-1] + 1]
        whole = self._grown(messages, answers, where)
        if whole is not None:
            return [whole]
        if (own := self._template_marks(messages)) is not None:
            runs = np.flatnonzero(np.diff(own[1], prepend=False, append=False)).reshape(-1, 2)
            spoken = [i for i in spoken if i < len(messages)]
            if len(runs) == len(spoken):
                for i, (first, end) in zip(spoken, runs, strict=True):
                    own[1][first:end] = i in answers
            if len(runs) == len(spoken) or answers == spoken:
                return [own]
        parts = [self._grown(messages[: i + 1], [i], where) for i in answers]
        if found := [part for part in parts if part is not None]:
            return found
        raise UserError(
            f"{where}: the chat template renders a conversation otherwise than its beginning,"
            " so the assistant's tokens cannot be told apart (a template with {% generation %} marks would say)"
        )

    def opening(self) -> list[int]:
        """The template's tokens up to where the user begins; empty where nothing stands there."""
        return self.encode(self._around_user()[0], special=False)

    def users_turn(self, tokens: list[int]) -> str:
        """What a model wrote after the opening, cut where the user's turn ends."""
        text = self.decode([token for token in tokens if token not in self.ends])
        closing = self._around_user()[1].strip().split("\n")[0]  # where it is no special token, as in "[/INST]"
        return (text.partition(closing)[0] if closing else text).strip()

    def turn_ends(self) -> frozenset[int]:
        """Token ids that end the user's turn: the ends of text, and a special token that follows the turn."""
        after = self.encode(self._around_user()[1].lstrip(), special=False)[:1]
        return self.ends | (frozenset(after) & frozenset(self._tokenizer.all_special_ids))

    def _around_user(self) -> tuple[str, str]:
        text = self._render([{"role": "user", "content": _MARK}], "the tokenizer", ask=True)
        before, mark, after = text.partition(_MARK)
        return (before, after) if mark else ("", "")  # a template may change what it is given

    def _grown(self, messages: list[dict[str, Any]], answers: list[int], where: str) -> Marked | None:
        """The conversation with some answers marked; None where a beginning renders otherwise."""
        text = self._render(messages, where)
        ids = self.encode(text, special=False)
        counts = np.zeros(len(ids), bool)
        for i in answers:
            before = self._render(messages[:i], where, ask=True)
            after = self._render(messages[: i + 1], where)
            if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
                return None
            # A token across the border belongs to the answer at its beginning, and not at its end.
            first = _common(ids, self.encode(before, special=False))
            end = _common(ids, self.encode(after, special=False))
            ended = next((at + 1 for at in range(first, end) if ids[at] in self.ends), end)
            counts[first:ended] = True  # what a template puts after the end (a line break) is never written
        return ids, counts

    def _template_marks(self, messages: list[dict[str, Any]]) -> Marked | None:
        template = self._tokenizer.chat_template
        if not isinstance(template, str) or "generation %}" not in template.replace("-%}", " %}").replace("  ", " "):
            return None
        found = self._tokenizer._tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        counts = np.array(found["assistant_masks"], bool)
        return (list(found["input_ids"]), counts) if counts.any() else None

    def _render(self, messages: list[dict[str, Any]], where: str, ask: bool = False) -> str:
        if not self.has_template:
            raise UserError(f"{where}: is a conversation, but the target has no chat template; expected plain text")
        return render(self._tokenizer, messages, ask=ask, where=where)


def _common(a: list[int], b: list[int]) -> int:
    """The length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
