"""`mlx-redrafter chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Generator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from .decoding import DraftShape
from .drafter import RecurrentDrafter
from .errors import UserError
from .generate import GenerationResponse, encode, stream_generate
from .generate_command import add_generation_arguments, add_model_arguments, apply_template, chooser, draft_shape
from .loading import load
from .sampling import Chooser

HELP = "talk to a model"
COMMANDS = "q: quit   r: forget the conversation   h: this help   Ctrl-C: stop the answer"


class Conversation:
    """Messages, and the KV cache of what the model has read of them.

    Each turn puts the whole conversation through the chat template and reads only what
    differs from what the cache holds.

    Args:
        model, tokenizer, drafter: as `load` returns them.
        system_prompt: stays when the conversation is reset.
        options: for every turn: max_tokens, chooser, shape, prefill_step_size.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        drafter: RecurrentDrafter | None = None,
        system_prompt: str | None = None,
        *,
        max_tokens: int = 256,
        chooser: Chooser | None = None,
        shape: DraftShape | None = None,
        prefill_step_size: int = 2048,
    ):
        self.model, self.tokenizer, self.drafter, self.system_prompt = model, tokenizer, drafter, system_prompt
        self.options: dict[str, Any] = {
            "max_tokens": max_tokens,
            "chooser": chooser,
            "shape": shape,
            "prefill_step_size": prefill_step_size,
        }
        self.reset()

    def reset(self) -> None:
        """Forgets everything but the system prompt."""
        system = self.system_prompt
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._forget()

    def ask(self, text: str) -> Generator[GenerationResponse]:
        """Streams the answer to a message.

        The message and the answer, or as much of it as was taken, stay in the
        conversation; if nothing could be answered, neither does.

        Raises:
            UserError: an empty message, a template that fails, a conversation beyond the context.
        """
        if not text.strip():
            raise UserError("the message is empty")
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._tokens_of(messages)
        kept = self._keep_common_prefix(prompt)
        answer = ""
        stream = stream_generate(
            self.model, self.tokenizer, prompt[kept:], self.drafter, prompt_cache=self._cache, **self.options
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
            else:
                self._forget()

    def _tokens_of(self, messages: list[dict[str, str]]) -> list[int]:
        if self.tokenizer.chat_template is None:
            return encode(self.tokenizer, "\n".join(message["content"] for message in messages) + "\n")
        return apply_template(self.tokenizer, messages)

    def _keep_common_prefix(self, prompt: list[int]) -> int:
        """Rolls the cache back to what it shares with the prompt; returns how many tokens that is."""
        held = max((int(c.offset) for c in self._cache if isinstance(getattr(c, "offset", None), int)), default=0)
        same = 0
        # One token at least has to be read, for there to be logits.
        for ours, theirs in zip(self._read[:held], prompt[:-1]):
            if ours != theirs:
                break
            same += 1
        if same < held:
            if not can_trim_prompt_cache(self._cache):
                self._forget()
                return 0
            trim_prompt_cache(self._cache, held - same)
        del self._read[same:]
        return same

    def _forget(self) -> None:
        self._cache = make_prompt_cache(self.model)
        self._read: list[int] = []  # the tokens whose rows the cache holds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_generation_arguments(parser, max_tokens=256)


def run(args: argparse.Namespace) -> None:
    shape, choose = draft_shape(args), chooser(args)
    model, drafter, tokenizer = load(
        args.model,
        args.draft,
        adapter_path=args.adapter_path,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )
    conversation = Conversation(
        model,
        tokenizer,
        drafter,
        args.system_prompt,
        max_tokens=args.max_tokens,
        chooser=choose,
        shape=shape,
        prefill_step_size=args.prefill_step_size,
    )
    if args.model is None:
        print("The embedded model continues Python code; name one that talks with --model.")
    print(COMMANDS)
    while True:
        try:
            text = input(">> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command = text.strip()
        if command == "q":
            return
        if command == "r":
            conversation.reset()
            mx.clear_cache()
            print("(forgotten)")
        elif command == "h":
            print(COMMANDS)
        elif command:
            answer(conversation, text)


def answer(conversation: Conversation, text: str) -> None:
    """Prints one answer as it comes and a line of figures; Ctrl-C ends it, a mistake is one line."""
    response = None
    stream = conversation.ask(text)
    try:
        for response in stream:
            print(response.text, end="", flush=True)
        stopped = ""
    except KeyboardInterrupt:
        stream.close()
        stopped = ", stopped"
    except UserError as error:
        print(f"({error})")
        return
    if response is None:
        print(f"\n({stopped.strip(', ') or 'no answer'})")
        return
    figures = f"{response.generation_tokens} tokens, {response.generation_tps:.1f} tokens/s"
    if response.method != "plain":
        figures += f", mean acceptance length {response.mean_acceptance_length:.2f}"
    elif response.reason:
        figures += f", without drafts: {response.reason}"
    print(f"\n[{figures}{stopped}]")
