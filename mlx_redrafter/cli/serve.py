"""`mlx-redrafter serve`: mlx_lm's server with drafts."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
from typing import Any

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.flag_types import real, size, whole
from mlx_redrafter.system.ranks import number_of_ranks
from mlx_redrafter.target.splitting import way
from mlx_redrafter.text.flags import (
    add_cache_arguments,
    add_choice_arguments,
    add_model_arguments,
    add_pipeline_argument,
    add_recording_argument,
    choose_target,
    draft_shape,
)

HELP = "serve a model over HTTP, as mlx_lm.server does"
KEY = "MLX_REDRAFTER_API_KEY"
NEEDED = ("jsonschema", "prometheus_client")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    add("--draft-model", metavar="DIR", dest="draft", help="the same as --draft; a draft model that is no drafter of"
        " this program is used as mlx_lm.server does")  # fmt: skip
    add_choice_arguments(parser, max_tokens=512)
    add_cache_arguments(parser)
    add_recording_argument(parser)
    add(
        "--host",
        default="127.0.0.1",
        help="listen at this address (default: %(default)s, for programs on this machine)",
    )
    add("--port", type=whole(0, 65535), default=8080, metavar="N", help="listen at this port; 0 takes any free one"
        " (default: %(default)s)")  # fmt: skip
    add(
        "--api-key",
        metavar="KEY",
        help=f"answer only those who send this key (default: that in ${KEY}, else everybody)",
    )
    add("--allowed-origins", type=origins, default=[], metavar="ORIGINS", help="let web pages from these origins ask,"
        " separated by commas; * lets all (default: none)")  # fmt: skip
    add("--chat-template", default="", metavar="TEXT", help="write conversations by this template, not the tokenizer's")
    add("--use-default-chat-template", action="store_true", help="refuse a tokenizer that has no chat template")
    add("--chat-template-args", type=json_object, default={}, metavar="JSON", help="give the chat template the"
        " arguments of this JSON object")  # fmt: skip
    add("--prompt-cache-size", type=whole(0), default=10, metavar="N", help="keep the KV caches of so many texts"
        " (default: %(default)s)")  # fmt: skip
    add("--prompt-cache-bytes", type=size, metavar="SIZE", help="keep KV caches within this size, as 4GB (default: a"
        " quarter of the memory that the model leaves)")  # fmt: skip
    add("--prompt-cache-dir", metavar="DIR", help="keep KV caches in this directory, too, from one start to the next")
    add("--prompt-cache-dir-bytes", type=size, default=10_000_000_000, metavar="SIZE", help="keep its files within this"
        " size (default: 10GB)")  # fmt: skip
    add(
        "--max-body-bytes", type=size, default=16_000_000, metavar="SIZE", help="refuse larger requests (default: 16MB)"
    )
    add("--max-context", type=whole(2), metavar="N", help="allow a prompt and its answer so many tokens (default: what"
        " the model can read)")  # fmt: skip
    add("--most-max-tokens", type=whole(1), metavar="N", help="refuse requests for more tokens than this (default: what"
        " the context leaves)")  # fmt: skip
    add("--max-queue", type=whole(1), default=64, metavar="N", help="let so many requests wait (default: %(default)s)")
    add("--queue-seconds", type=real(0), default=600, metavar="S", help="let a request wait so long for its turn"
        " (default: %(default)s)")  # fmt: skip
    levels = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    add("--log-level", choices=levels, default="INFO", help="log what is at least so grave (default: %(default)s)")
    add("--decode-concurrency", type=whole(1), default=32, metavar="N", help="write so many texts together; 1 answers"
        " one request at a time (default: %(default)s)")  # fmt: skip
    add("--prompt-concurrency", type=whole(1), default=8, metavar="N", help="let so many prompts join between two steps"
        " (default: %(default)s)")  # fmt: skip
    add_pipeline_argument(parser)


def origins(text: str) -> list[str]:
    return [origin.strip() for origin in text.split(",") if origin.strip()]


def json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a JSON object") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"is a JSON {type(found).__name__}, expected an object")
    return found


def run(args: argparse.Namespace) -> None:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"serve needs {missing[0]}: pip install 'mlx-redrafter[serve]'")
    logging.basicConfig(level=args.log_level, format="%(asctime)s %(levelname)s %(message)s")
    if args.pipeline and number_of_ranks() == 1:
        logging.warning("--pipeline has no effect: one process serves")
    if said := choose_target(args):
        print(said)
    prepare(args)
    from mlx_redrafter.server import seam

    seam.install()  # before anything is imported that another mlx-lm lacks
    from mlx_redrafter.server.app import serve

    serve(args)


def prepare(args: argparse.Namespace) -> argparse.Namespace:
    """Fills in what the server's parts expect beside the flags."""
    args.api_key = args.api_key or os.environ.get(KEY) or None
    args.shape, args.split = draft_shape(args), way(args.pipeline)
    # Names that mlx_lm's parts read.
    args.draft_model = None
    args.pipeline = False
    args.max_tokens = 2**31 - 1 if args.max_tokens == -1 else args.max_tokens
    args.num_draft_tokens = args.num_draft_tokens if isinstance(args.num_draft_tokens, int) else 3
    return args
