"""`mlx-redrafter convert target` and `convert drafter`."""

from __future__ import annotations

import argparse

from ..drafter import load_drafter
from ..loading import DTYPES
from .drafter import convert_drafter
from .target import convert_target

HELP = "convert Hugging Face weights of a target or of a drafter to MLX"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    target = kinds.add_parser("target", help="a language model, by mlx-lm's own conversion")
    drafter = kinds.add_parser("drafter", help="a ReDrafter checkpoint in Apple's layout")
    for child in (target, drafter):
        add = child.add_argument
        add("--hf-path", required=True, help="local directory or Hub id to read")
        add("--mlx-path", required=True, help="directory to write; must not exist yet")
        add("-q", "--quantize", action="store_true", help="quantise the weights")
        add("--q-bits", type=int, default=4, help="bits per weight (default: %(default)s)")
        add("--q-group-size", type=int, default=64, help="weights per scale (default: %(default)s)")
        add("--dtype", choices=DTYPES, help="type of unquantised weights (default: as they are)")
    target.add_argument("--trust-remote-code", action="store_true")


def run(args: argparse.Namespace) -> None:
    common = {
        "quantize": args.quantize,
        "q_bits": args.q_bits,
        "q_group_size": args.q_group_size,
        "dtype": args.dtype,
    }
    if args.kind == "target":
        path = convert_target(args.hf_path, args.mlx_path, trust_remote_code=args.trust_remote_code, **common)
        print(f"{path}: an mlx-lm model; use it with --model {path}")
        return
    path = convert_drafter(args.hf_path, args.mlx_path, **common)
    config = load_drafter(path).config
    print(
        f"{path}: a drafter for targets of hidden size {config.hidden_size} and vocabulary {config.vocab_size};"
        f" use it with --draft {path}"
    )
