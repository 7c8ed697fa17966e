"""`mlx-redrafter convert target`, `drafter`, `export` and `medusa-tree`."""

from __future__ import annotations

import argparse
import functools
import pathlib

from mlx_lm.convert import QUANT_RECIPES
from mlx_redrafter.convert.drafter import convert_drafter
from mlx_redrafter.convert.export import export
from mlx_redrafter.convert.target import convert_target

from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.medusa_tree import PUBLISHED
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.flag_types import whole
from mlx_redrafter.system.hub import require_login, upload
from mlx_redrafter.text.loading import DTYPES, EMBEDDED_PAIR
from mlx_redrafter.training.drafters.text_fit import counts_of, fit_medusa_tree
from mlx_redrafter.training.text.data_plan import SELF

HELP = "convert weights of a target or of a drafter from the Hugging Face layout to MLX, or back"
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    target = kinds.add_parser("target", help="a language model, to mlx-lm's layout")
    drafter = kinds.add_parser(
        "drafter",
        help="a ReDrafter checkpoint in Apple's layout, Medusa or EAGLE-3 heads, or any of them in ours; or a model's"
        " multi-token-prediction layer",
    )
    back = kinds.add_parser("export", help="a converted target or drafter, back to the Hugging Face layout")
    for child in (target, drafter):
        add = child.add_argument
        add("--hf-path", required=True, help="local directory or Hub id to read; may be converted or quantised already;"
            " a target may be a GGUF file")  # fmt: skip
        add("--mlx-path", required=True, help="directory to write; must not exist yet")
        add("-q", "--quantize", action="store_true", help="quantise the weights")
        add("--q-bits", type=int, help="bits per weight (default: 4)")
        add("--q-group-size", type=int, help="weights per scale (default: 64)")
        add("--dtype", choices=DTYPES, help="type of unquantised weights (default: as they are)")
    target.add_argument("--q-mode", choices=MODES, default="affine", help="how to quantise (default: %(default)s)")
    target.add_argument("--gguf", metavar="NAME", help="read this GGUF file, named in full or in part, where"
        " --hf-path has several")  # fmt: skip
    target.add_argument("--quant-predicate", choices=QUANT_RECIPES, help="a mixed recipe, in place of --q-bits")
    drafter.add_argument("--target", help="directory, GGUF file or Hub id of the target it is for, to be told later if"
        " it is used with another")  # fmt: skip
    add = drafter.add_argument
    add("--draft-vocab-size", type=whole(1), help="keep only so many tokens of those that a ReDrafter drafter drafts,"
        " the most frequent ones in --text")  # fmt: skip
    add("--text", nargs="+", metavar="DIR", help="rows that trainings for its target wrote (training/text)")
    add = back.add_argument
    add("--mlx-path", required=True, help="local directory or Hub id to read")
    add("--hf-path", required=True, help="directory to write; must not exist yet")
    tree = kinds.add_parser("medusa-tree", help="fit the static tree of converted Medusa heads to text")
    add = tree.add_argument
    add("--mlx-path", required=True, help="directory of the heads; their config.json gets the tree")
    add("--target", default=EMBEDDED_PAIR, help="directory, GGUF file or Hub id of their target (default: %(default)s)")
    add("--data", nargs="+", default=[SELF], metavar="SOURCE", help="text, as for `mlx-redrafter train`"
        " (default: the target writes it)")  # fmt: skip
    add("--text", metavar="DIR", help="rows that a training for this target wrote, in place of --data")
    add("--rows", type=int, default=64, help="texts to look at (default: %(default)s)")
    add("--row-length", type=int, default=192, help="tokens of each text (default: %(default)s)")
    add("--tree-size", type=int, default=len(PUBLISHED), help="nodes (default: %(default)s)")
    for child in kinds.choices.values():
        child.add_argument("--trust-remote-code", action="store_true")
    for child in (target, drafter, back):
        child.add_argument("-d", "--dequantize", action="store_true", help="write quantised weights in full")
        child.add_argument("--upload-repo", metavar="OWNER/NAME", help="Hub repository to upload the result to")


def run(args: argparse.Namespace) -> None:
    if args.kind == "medusa-tree":
        return _fit_tree(args)
    if args.upload_repo is not None:
        require_login(args.upload_repo)
    if args.kind == "export":
        source = args.mlx_path
        path = export(args.mlx_path, args.hf_path, args.dequantize, args.trust_remote_code)
        print(f"{path}: in the Hugging Face layout")
    else:
        source = args.hf_path
        path = _convert(args)
    if args.upload_repo is not None:
        print(f"{args.upload_repo}: uploaded, see {upload(path, args.upload_repo, source)}")


def _fit_tree(args: argparse.Namespace) -> None:
    sizes = (args.rows, args.row_length, args.tree_size)
    choices, length = fit_medusa_tree(
        args.mlx_path, args.target, tuple(args.data), args.text, *sizes, args.trust_remote_code
    )
    print(f"{args.mlx_path}: a tree of {len(choices)} nodes, expected acceptance length {length:.2f} on this text")


def _convert(args: argparse.Namespace) -> pathlib.Path:
    if args.quantize and args.dequantize:
        raise UserError("--quantize and --dequantize: expected at most one of them")
    mode = getattr(args, "q_mode", "affine")
    for name in ("q_bits", "q_group_size", "quant_predicate"):
        flag = f"--{name.replace('_', '-')}"
        if getattr(args, name, None) is None:
            continue
        if not args.quantize:
            raise UserError(f"{flag} needs --quantize")
        if mode != "affine":
            raise UserError(f"{flag} goes with --q-mode affine; {mode} has its own")
    if mode != "affine" and not args.quantize:
        raise UserError(f"--q-mode {mode} needs --quantize")
    common = {
        "quantize": args.quantize,
        "q_bits": 4 if args.q_bits is None else args.q_bits,
        "q_group_size": 64 if args.q_group_size is None else args.q_group_size,
        "dtype": args.dtype,
        "dequantize": args.dequantize,
        "trust_remote_code": args.trust_remote_code,
    }
    if args.kind == "target":
        kinds = {"q_mode": mode, "q_recipe": args.quant_predicate, "gguf_name": args.gguf}
        path = convert_target(args.hf_path, args.mlx_path, **kinds, **common)
        print(f"{path}: an mlx-lm model; use it with --model {path}")
        return path
    if (args.draft_vocab_size is None) != (args.text is None):
        raise UserError("--draft-vocab-size and --text: expected both or neither")
    smaller = {"draft_vocab_size": args.draft_vocab_size, "count": functools.partial(counts_of, args.text)}
    path = convert_drafter(args.hf_path, args.mlx_path, target=args.target, **smaller, **common)
    config = open_drafter(path).config
    fits = f"hidden size {config.hidden_size} and vocabulary {config.vocab_size}"
    print(f"{path}: a drafter for targets of {fits}; use it with --draft {path}")
    return path
