"""A conversation whose KV cache outlives its turns."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Generator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.errors import UserError, one_line
from mlx_redrafter.system.threads import InUse
from mlx_redrafter.target.cache.kv_cache import cached
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.equality import first_difference
from mlx_redrafter.text.generate import stream_generate
from mlx_redrafter.text.prompt_cache import load_cache_file, save_cache_file
from mlx_redrafter.text.prompts import encode, encode_messages, plain_messages
from mlx_redrafter.text.responses import GenerationResponse


class Conversation:
    """Messages, and the KV cache of what the model has read of them.

    Each turn puts the whole conversation through the chat template and reads only what
    differs from what the cache holds; `messages` may be edited between turns.

    Args:
        model, tokenizer, drafter: as `load` returns them.
        system_prompt: stays when the conversation is reset.
        template_options: more arguments for the chat template.
        options: for every turn, as for `stream_generate`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        drafter: Drafter | None = None,
        system_prompt: str | None = None,
        template_options: dict[str, Any] | None = None,
        **options: Any,
    ):
        self.model, self.tokenizer, self.drafter, self.system_prompt = model, tokenizer, drafter, system_prompt
        self.template_options, self.options = template_options or {}, options
        self._cache: list[Any] = []
        self._read: list[int] = []  # the tokens whose rows the cache holds
        self._unknown: list[int] = []  # placeholders for rows before them, from another program's file
        self._use = InUse()
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system prompt, and gives the memory of the cache back.

        Raises:
            UserError: an answer is still open.
        """
        with self._alone():
            system = self.system_prompt
            self.messages = [] if system is None else [{"role": "system", "content": system}]
            self._forget()
        mx.clear_cache()

    def ask(self, text: str) -> Generator[GenerationResponse]:
        """Streams the answer to a message.

        The message and the answer, or as much of it as was taken, stay in the
        conversation; if nothing could be answered, neither does.

        Raises:
            UserError: an empty message, a message in the history that has no text, a template that
                fails, a conversation beyond the context, an earlier answer that is still open.
        """
        with self._alone():
            yield from self._answer(text)

    def _answer(self, text: str) -> Generator[GenerationResponse]:
        if not text.strip():
            raise UserError("the message is empty")
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._tokens_of(messages)
        kept = self._keep_common_prefix(prompt)
        answer = ""
        stream = stream_generate(
            self.model,
            self.tokenizer,
            prompt[kept:],
            self.drafter,
            prompt_cache=self._cache,
            cached_tokens=prompt[:kept],
            **self.options,
        )
        try:
            for response in stream:
                if len(self._read) == kept:
                    self._read += prompt[kept:]
                self._read.append(response.token)
                answer += response.text
                yield response
        finally:
            stream.close()
            if len(self._read) > len(prompt):
                self.messages = [*messages, {"role": "assistant", "content": answer}]
            self._fit_cache()

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """Raises UserError while an answer is open."""
        return self._use.alone([self], "an earlier answer is still open: read it to its end or close() it first")

    @property
    def begun(self) -> bool:
        """Whether the model has read anything that a file could keep."""
        return cached(self._cache) > 0

    def save(self, path: str | pathlib.Path, name: str) -> None:
        """Writes the cache in mlx-lm's format, with the messages and tokens it stands for.

        Args:
            name: the model's directory or Hub id.

        Raises:
            UserError: a file that cannot be written, an answer that is still open.
        """
        with self._alone():
            tokens = (self._unknown + self._read)[: cached(self._cache)]
            save_cache_file(path, self._cache, name, {}, messages=self.messages, tokens=tokens)

    def load(self, path: str | pathlib.Path, name: str) -> None:
        """Goes on from a cache file.

        One that mlx-lm wrote says nothing of its tokens: what it holds then stays before
        the conversation, and the first message continues it, as in mlx_lm.generate.

        Raises:
            UserError: a file that is missing, damaged or of another model; the
                conversation stays as it was.
        """
        with self._alone():
            cache, metadata = load_cache_file(path, self.model, name)
        try:
            tokens = json.loads(metadata["tokens"]) if "tokens" in metadata else None
            messages = json.loads(metadata.get("messages", "[]"))
        except ValueError as error:
            raise UserError(f"--prompt-cache-file {path}: unreadable metadata ({one_line(error)})") from error
        if tokens is None:
            self._unknown, self._read = [_UNKNOWN] * cached(cache), []
        else:
            self._unknown = [t for t in tokens if t == _UNKNOWN]
            self._read = tokens[len(self._unknown) :]
        self._cache, self.messages = cache, messages or self.messages
        self._fit_cache()

    def last_turn(self) -> tuple[list[dict[str, Any]] | str, str]:
        """What the model answered last, as messages or, without a chat template, as text; and its answer."""
        *asked, answer = self.messages
        return (_as_text(asked) if self.tokenizer.chat_template is None else asked), answer["content"]

    def _tokens_of(self, messages: list[dict[str, Any]]) -> list[int]:
        if self.tokenizer.chat_template is None:
            return encode(self.tokenizer, _as_text(messages))
        ids = encode_messages(self.tokenizer, messages, self.template_options, after_cache=bool(self._unknown))
        ranks = Target.of(self.model).ranks  # which roll their caches back to the same place
        return ids if ranks is None else ranks.share(ids)

    def _keep_common_prefix(self, prompt: list[int]) -> int:
        """Rolls the cache back to what it shares with the prompt; returns how many tokens that is."""
        held = cached(self._cache) - len(self._unknown)
        read, known = self._read[:held], prompt[:-1]  # one token at least has to be read, for there to be logits
        same = first_difference(read, known)
        same = len(read) if same is None else same
        if same < held and not can_trim_prompt_cache(self._cache):
            same = 0
        del self._read[same:]
        self._fit_cache()
        return same

    def _fit_cache(self) -> None:
        """Makes the cache hold exactly the rows that are known of, after any way of leaving a turn."""
        expected, held = len(self._unknown) + len(self._read), cached(self._cache)
        if held == expected:
            return
        if held > expected and can_trim_prompt_cache(self._cache):
            trim_prompt_cache(self._cache, held - expected)
            return
        if self._unknown:
            raise UserError("the prompt cache cannot be rolled back to what it was before this conversation")
        self._forget()  # the messages are all that is needed to read it again

    def _forget(self) -> None:
        self._cache = make_prompt_cache(self.model)
        self._read, self._unknown = [], []


def _as_text(messages: list[dict[str, Any]]) -> str:
    return "".join(f"{message['content']}\n" for message in plain_messages(messages))


_UNKNOWN = -1
