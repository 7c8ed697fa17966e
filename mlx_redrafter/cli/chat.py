"""`mlx-redrafter chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import pathlib

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.ranks import Ranks, connected
from mlx_redrafter.text.conversation import Conversation
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
from mlx_redrafter.text.prompt_cache import check_cache_name
from mlx_redrafter.text.responses import drafted
from mlx_redrafter.text.sessions.recorder import Recorder

HELP = "talk to a model"
COMMANDS = """q: quit   r: forget the conversation   h: this help   Ctrl-C: stop the answer
\"\"\" begins a message of several lines, and \"\"\" ends it"""
FENCE = '"""'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_generation_arguments(parser, max_tokens=256)
    add_recording_argument(parser)
    add_pipeline_argument(parser)
    parser.add_argument(
        "--prompt-cache-file",
        metavar="FILE",
        help="go on from the conversation in this file, if there is one, and save it there at the end",
    )


def run(args: argparse.Namespace) -> None:
    draft_shape(args)
    constraint_of(args)
    template = template_options(args)
    said = choose_target(args)
    if args.prompt_cache_file is not None:
        check_cache_name(args.prompt_cache_file)
    recorder, ranks = Recorder() if args.record_sessions else None, connected()
    model, drafter, tokenizer = load_from(args)
    options = generation_options(args, tokenizer)
    conversation = Conversation(model, tokenizer, drafter, args.system_prompt, template, **options)
    file = args.prompt_cache_file
    if file is not None and pathlib.Path(file).exists():
        conversation.load(file, model_name(args))
        print(f"(going on from {file}: {len(conversation.messages)} messages)")
    if said:
        print(f"{said} (--model names another)")
    print(COMMANDS)
    try:
        while (text := read_message() if ranks is None else message_for_all(ranks)) is not None:
            command = text.strip()
            if command == "q":
                break
            if command == "r":
                conversation.reset()
                print("(forgotten)")
            elif command == "h":
                print(COMMANDS)
            elif command:
                ended = answer(conversation, text)
                if recorder is not None and ended is not None:
                    recorder.note(
                        model, tokenizer, args.model, *conversation.last_turn(), generation_settings(args), ended
                    )
    finally:
        if file is not None and conversation.begun:
            conversation.save(file, model_name(args))


def message_for_all(ranks: Ranks) -> str | None:
    """The message that rank 0 reads."""
    return ranks.share(read_message() if ranks.first else None)


def read_message() -> str | None:
    """One message from the terminal, of one line or fenced; None at the end of input or on Ctrl-C."""
    try:
        line = input(">> ")
        if not line.lstrip().startswith(FENCE):
            return line
        lines = [line.lstrip().removeprefix(FENCE)]
        while FENCE not in lines[-1]:
            lines.append(input(".. "))
        lines[-1] = lines[-1].partition(FENCE)[0]
        return "\n".join(lines).strip("\n")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def answer(conversation: Conversation, text: str) -> bool | None:
    """Prints one answer as it comes and a line of figures; Ctrl-C ends it, a mistake is one line.

    Returns:
        whether the model ended the answer itself; None where there is none.
    """
    response = None
    stream = conversation.ask(text)
    try:
        for response in stream:
            print(response.text, end="", flush=True)
        stopped = ""
    except KeyboardInterrupt:
        if connected() is not None:  # which do not stop at the same token
            raise
        stream.close()
        stopped = ", stopped"
    except UserError as error:
        print(f"({error})")
        return None
    if response is None:
        print(f"\n({stopped.strip(', ') or 'no answer'})")
        return None
    figures = f"{response.generation_tokens} tokens, {response.generation_tps:.1f} tokens/s"
    if response.method != "plain":
        figures += f", mean acceptance length {response.mean_acceptance_length:.2f}, {drafted(response)}"
    elif response.reason:
        figures += f", without drafts: {response.reason}"
    print(f"\n[{figures}{stopped}]")
    return response.finish_reason == "stop"
