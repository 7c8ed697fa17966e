"""`mlx-redrafter generate`: continues a prompt, or answers it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

import mlx.core as mx

from mlx_redrafter.errors import UserError
from mlx_redrafter.text.flags import (
    add_generation_arguments,
    add_model_arguments,
    add_pipeline_argument,
    add_recording_argument,
    choose_target,
    constraint_of,
    draft_shape,
    generation_options,
    generation_settings,
    load_from,
    model_name,
    template_options,
)
from mlx_redrafter.text.generate import stream_generate
from mlx_redrafter.text.loading import NO_DRAFTER, is_embedded
from mlx_redrafter.text.prompt_cache import load_cache_file
from mlx_redrafter.text.prompts import encode, encode_messages
from mlx_redrafter.text.responses import GenerationResponse, summary
from mlx_redrafter.text.sessions.recorder import Recorder

HELP = "continue a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_generation_arguments(parser, max_tokens=100)
    add_recording_argument(parser)
    add_pipeline_argument(parser)
    add = parser.add_argument
    add("--prompt", "-p", required=True, metavar="TEXT", help="continue or answer this text; - reads standard input")
    add("--prompt-cache-file", metavar="FILE", help="go on from the prompt cache in this file; the file stays as it is")
    add("--ignore-chat-template", action="store_true", help="continue the prompt as it is")
    add("--json", action="store_true", help="print one JSON object at the end, and nothing else")


def what_is_asked(args: argparse.Namespace, tokenizer: Any) -> list[dict[str, Any]] | str:
    """The messages to answer, or the text to continue where no chat template is used."""
    # A shell hands over "\\n" as two characters; mlx-lm reads them as a line break, too.
    text = sys.stdin.read() if args.prompt == "-" else args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    if not text:
        raise UserError("--prompt is empty, expected text")
    if args.ignore_chat_template or is_embedded(args.model) or tokenizer.chat_template is None:
        if args.system_prompt is not None:
            raise UserError("--system-prompt needs a chat template, which is not used here")
        return text
    system = [] if args.system_prompt is None else [{"role": "system", "content": args.system_prompt}]
    return [*system, {"role": "user", "content": text}]


def run(args: argparse.Namespace) -> None:
    draft_shape(args)
    constraint_of(args)
    template_options(args)
    if args.prompt == "":
        raise UserError("--prompt is empty, expected text")
    if args.record_sessions and args.prompt_cache_file is not None:
        raise UserError("--record-sessions: what the prompt cache holds is not known; expected no --prompt-cache-file")
    recorder = Recorder() if args.record_sessions else None
    said = choose_target(args)
    model, drafter, tokenizer = load_from(args)
    options = generation_options(args, tokenizer)
    if args.prompt_cache_file is not None:
        options["prompt_cache"], _ = load_cache_file(args.prompt_cache_file, model, model_name(args))
    asked = what_is_asked(args, tokenizer)
    # As in mlx-lm, what the template puts before the message is in the prompt cache already.
    after_cache = args.prompt_cache_file is not None
    prompt = (
        encode(tokenizer, asked)
        if isinstance(asked, str)
        else encode_messages(tokenizer, asked, template_options(args), after_cache)
    )
    mx.reset_peak_memory()
    pieces, tokens, response = [], [], None
    for response in stream_generate(model, tokenizer, prompt, drafter, **options):
        pieces.append(response.text)
        tokens.append(response.token)
        if not args.json:
            print(response.text, end="", flush=True)
    assert response is not None
    if recorder is not None:
        ended = response.finish_reason == "stop"
        recorder.note(model, tokenizer, args.model, asked, "".join(pieces), generation_settings(args), ended)
    if args.json:
        print(json.dumps({"model": args.model} | report("".join(pieces), tokens, response)))
    else:
        print("\n" + "=" * 10 + "\n" + summary(response))
        if said:
            print(said)
        elif response.method == "plain" and drafter is None and args.draft is None:
            print(f"No drafter was given (--draft PATH, or --draft {NO_DRAFTER} to say so): decoded plainly")


def report(text: str, tokens: list[int], last: GenerationResponse) -> dict[str, Any]:
    """What `--json` prints: the whole text and the figures of the last response."""
    fields = {field.name: getattr(last, field.name) for field in dataclasses.fields(last)}
    for name in ("token", "logprobs", "from_draft"):  # of one token
        del fields[name]
    shape = None if last.shape is None else dataclasses.asdict(last.shape)
    return fields | {"text": text, "tokens": tokens, "shape": shape, "peak_memory_gb": fields.pop("peak_memory")}
