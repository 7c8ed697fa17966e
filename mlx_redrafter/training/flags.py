"""Defines and checks the flags of `mlx-redrafter train`, and turns them into plans.

Knows nothing of running a plan.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from typing import Any

import mlx.core as mx

from mlx_redrafter.drafting.drafter_files import check_quantization
from mlx_redrafter.drafting.medusa_tree import PUBLISHED
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.flag_types import flag, real, whole
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.flags import add_target_arguments
from mlx_redrafter.training.drafters.init_weights import OUTPUTS
from mlx_redrafter.training.drafters.kinds import METHODS
from mlx_redrafter.training.drafters.recipes import RECIPES, USUAL
from mlx_redrafter.training.loss import KL, LABELS, Objective
from mlx_redrafter.training.text.data_plan import REGENERATED, SELF, SESSIONS, DataPlan
from mlx_redrafter.training.trainer import TrainingPlan, parts_of
from mlx_redrafter.training.update import AUTO, OFF, ON

POSITIVE = real(math.ulp(0.0), words="more than 0")
SAY, STOP = "say", "stop"
DECAY = 0.9  # weight of each draft step beside the one before it


class _Given(argparse.Action):
    """Stores a flag's value, and that it was given: a run that goes on has the other flags already."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, _flag: Any = None) -> None:
        setattr(namespace, self.dest, True if self.nargs == 0 else values)
        namespace.given = {*getattr(namespace, "given", ()), self.dest}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = functools.partial(parser.add_argument, action=_Given)
    add_target_arguments(add)
    add("--out", required=True, help="directory for the drafter, its log and its checkpoints")
    add("--resume", nargs=0, default=False, help="go on with the run in --out; other flags are those it was begun with,"
        " unless given: --iters, --eval-every and the like may change")  # fmt: skip
    add("--recipe", choices=RECIPES, default=USUAL, help="what is taken for flags that are not given: plain, a head"
        " that reads the last hidden state; rich, one that reads more of the target and of the text; apple, Apple's"
        " layout and training (default: %(default)s)")  # fmt: skip
    add("--seed", type=whole(0, 2**32 - 1), default=0)
    add("--upload-repo", metavar="OWNER/NAME", help="Hub repository to upload the finished drafter to")
    add("--trust-remote-code", action="store_true")

    add = functools.partial(parser.add_argument_group("text").add_argument, action=_Given)
    add("--data", nargs="+", default=[SELF], metavar="SOURCE", help=f"{SELF}: the target writes its own text (default);"
        f" {REGENERATED}: it answers --prompts; {SESSIONS}: what --record-sessions kept, answered; or files,"
        " directories and Hub data sets: json lines with messages,"
        " conversations, instruction and output, prompt and completion, or text; csv; text; source trees")  # fmt: skip
    add("--text", nargs="+", metavar="DIR", help="rows that earlier runs for this target wrote (training/text), in"
        " place of new ones")  # fmt: skip
    add("--prompts", metavar="PATH", help="prompts for the target to answer: json lines, csv or text")
    add("--prefixes", nargs="+", default=[], metavar="PATH", help="files or directories to cut beginnings from, which"
        " the target continues (default: its chat template; the embedded target: the standard library)")  # fmt: skip
    add("--prefix-length", type=int, default=32, help="tokens of each beginning (default: %(default)s)")
    add("--rows", type=int, help="texts to write or read (default: 2048 to write, all to read)")
    add("--row-length", type=int, default=192, help="tokens of each text (default: %(default)s)")
    add("--held-out", type=whole(1), default=16, help="texts kept for evaluation (default: %(default)s)")
    add("--temps", type=float, nargs="+", default=[0.0, 0.5, 1.0], help="temperatures the target writes at, in turn")
    add("--write-batch-size", type=int, default=64, help="texts it writes at a time (default: %(default)s)")

    add = functools.partial(parser.add_argument_group("drafter").add_argument, action=_Given)
    add("--method", choices=METHODS, default="redrafter", help="kind of drafter: a recurrent head (default), Medusa"
        " heads, one per draft step, an EAGLE-3 head, or a draft model for mlx_lm, one that --init names")  # fmt: skip
    add("--init", metavar="DRAFTER", help="begin from a drafter's weights, when its target has changed or there is more"
        " text; its shape is kept")  # fmt: skip
    add("--exit-dim", type=whole(1), help="width of the residual blocks (default: the target's hidden size)")
    add("--num-draft-layers", type=whole(0, 64), help="residual blocks (default: 2; of each Medusa head 1)")
    add("--no-rnn", nargs=0, default=False, help="sum embeddings in place of the gated recurrence")
    add("--context-layers", type=whole(1), nargs="+", metavar="N", help="hidden states of the target that a recurrent"
        " or EAGLE-3 head reads, by the number of layers passed (default: the last alone; of EAGLE-3 a quarter, a half"
        " and all of the layers)")  # fmt: skip
    add("--prefix-window", type=whole(1), metavar="TOKENS", help="prefix attention: a recurrent head also reads so many"
        " tokens of the text (default: none)")  # fmt: skip
    add("--prefix-layers", type=whole(1, 64), help="layers of prefix attention (default: 1)")
    add("--output-norm", nargs=0, default=False, help="normalise what a recurrent head's output layer reads")
    add("--draft-vocab-size", type=whole(1), help="draft only so many tokens, the most frequent ones (default: all)")
    add("--output-layer", choices=OUTPUTS, help="begin from the target's output layer (default)"
        " or at random, or stay tied to it: not trained, not stored")  # fmt: skip
    add("--tree-size", type=whole(1, 1024), help="nodes of the static tree that is fitted to held-out text for Medusa"
        f" heads (default: {len(PUBLISHED)})")  # fmt: skip
    add("--q-bits", type=int, help="quantise the finished drafter to so many bits")
    add("--q-group-size", type=int, default=64, help="weights that share a scale (default: %(default)s)")
    add("--q-aware", nargs=0, default=False, help="train with the weights rounded to --q-bits")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16",
        help="type of the finished drafter's weights (default: %(default)s)")  # fmt: skip

    add = functools.partial(parser.add_argument_group("objective").add_argument, action=_Given)
    add("--loss", choices=LABELS, default=KL, help="learn the target's distribution (default), the same by what of"
        " it would be accepted (lk), its most probable token (hard), or the token that follows in the text (Apple's"
        " training)")  # fmt: skip
    add(
        "--teacher-top-k",
        type=whole(0),
        default=16,
        help="tokens of the distribution that count, 0 for all (default: 16)",
    )
    add("--loss-vocab", type=whole(0), default=0, metavar="TOKENS", help="tokens that a distribution is over in an"
        " update: those of its labels, and others at random; 0 for all (default)")  # fmt: skip
    add("--learn-prompts", nargs=0, default=False, help="learn prompts like answers, but for what all texts begin with")
    add("--teacher-temp", type=POSITIVE, default=1.0, help="temperature of the distribution (default: %(default)s)")
    add("--beam-length", type=whole(2, 32), default=5, help="tokens per beam, the root included: one draft step less is"
        " learned (default: %(default)s)")  # fmt: skip
    add("--step-weights", type=float, nargs="+", help="weight of each draft step in the loss (default: 0.9^k)")
    add("--step-shares", type=float, nargs="+", help="share of the positions at which each draft step is learned, a"
        " random choice per update (default: 1 0.5 0.3 0.2 ..)")  # fmt: skip

    add = functools.partial(parser.add_argument_group("training").add_argument, action=_Given)
    add("--iters", type=whole(1), default=2000, help="updates (default: %(default)s)")
    add(
        "--batch-size",
        type=whole(1),
        default=6,
        help="texts per update, on all machines together (default: %(default)s)",
    )
    add("--grad-accumulation", type=whole(1), default=1, help="parts to compute a batch in (default: %(default)s)")
    add("--learning-rate", type=POSITIVE, default=2e-3, help="at its peak (default: %(default)s)")
    add("--warm-up", type=whole(0), help="updates over which it rises (default: a tenth of --iters, at most 50)")
    add("--max-grad-norm", type=POSITIVE, default=1.0, help="clip longer gradients (default: %(default)s)")
    add("--weight-decay", type=real(0), default=0.01, help="of AdamW (default: %(default)s)")
    add("--dropout", type=real(0, 0.9), default=0.0, help="share of the numbers that a drafter reads that an update"
        " leaves out, where it sees the same text often (default: none)")  # fmt: skip
    add("--train-dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="to compute in; weights stay in float32 (default: bfloat16 on a GPU, float32 on a CPU)")  # fmt: skip
    add("--compile", choices=(AUTO, ON, OFF), default=AUTO, help="compile the update (default: on a GPU; on a CPU that"
        " takes g++ and half a minute: from 500 updates on)")  # fmt: skip
    add("--save-every", type=whole(1), default=200, help="updates between checkpoints (default: %(default)s)")
    add("--eval-every", type=whole(0), help="updates between measurements of acceptance, 0 for none (default: a tenth"
        " of --iters)")  # fmt: skip
    add("--patience", type=whole(0), default=0, help="stop after so many of them without a better one; 0: never"
        " (default)")  # fmt: skip
    add("--expected", nargs="?", choices=(SAY, STOP), const=SAY, help="after a tenth of the updates, say what"
        " acceptance and speed-up on this device to expect at the end, and whether going on pays; with stop, stop where"
        " it does not")  # fmt: skip
    add("--cache-gb", type=real(0, 2**20), default=4.0, help="disk for what the target made of the text, so that it"
        " reads each text once (default: %(default)s)")  # fmt: skip


def data_plan(args: argparse.Namespace) -> DataPlan:
    """Raises UserError for a flag out of its range."""
    same = ("rows", "held_out", "seed", "prompts", "prefix_length")  # the plan's name is the flag's
    lists = {name: tuple(getattr(args, name)) for name in ("data", "temps", "prefixes")}
    named = {name: getattr(args, name) for name in same} | lists
    return DataPlan(**named, length=args.row_length, batch_size=args.write_batch_size)


def training_plan(args: argparse.Namespace, on_cpu: bool) -> TrainingPlan:
    """The plan of the training; `check` comes before."""
    steps = METHODS[args.method].steps(args)
    weights = args.step_weights or [DECAY**k for k in range(steps)]
    shares = args.step_shares or [1.0, *(max(0.15, 1 / (k + 1) - 0.02 * k) for k in range(1, steps))]
    half = args.train_dtype == "bfloat16" or (args.train_dtype == "auto" and not on_cpu)
    plain = {field.name for field in dataclasses.fields(TrainingPlan)} & vars(args).keys()
    named = {name: getattr(args, name) for name in plain} | {
        "warm_up": min(50, args.iters // 10) if args.warm_up is None else args.warm_up,
        "eval_every": max(1, args.iters // 10) if args.eval_every is None else args.eval_every,
        "dtype": mx.bfloat16 if half else mx.float32,
    }
    return TrainingPlan(
        **named,
        objective=Objective(
            *(args.loss, args.teacher_top_k, args.teacher_temp, tuple(weights), tuple(shares)),
            *(args.loss_vocab, args.learn_prompts),
        ),
        quantization={"group_size": args.q_group_size, "bits": args.q_bits} if args.q_aware else None,
    )


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what is wrong with the flags alone."""
    if args.warm_up is not None and args.warm_up > args.iters:
        raise UserError(f"--warm-up is {args.warm_up}, expected 0 to {args.iters}, the updates")
    if args.row_length < args.beam_length + 2:
        raise UserError(f"--row-length is {args.row_length}, expected {args.beam_length + 2} or more (--beam-length)")
    _check_steps(args)
    parts_of(args.batch_size, args.grad_accumulation, mx.distributed.init())
    if args.patience and args.eval_every == 0:
        raise UserError(f"--patience {args.patience} needs evaluations, but --eval-every is 0")
    if args.expected and mx.distributed.init().size() > 1:
        raise UserError("--expected is for one process: each measures its own steps")
    if args.q_bits is not None:
        check_quantization(args.q_bits, args.q_group_size)
    elif args.q_aware:
        raise UserError("--q-aware needs --q-bits")
    METHODS[args.method].check(args)


def _check_steps(args: argparse.Namespace) -> None:
    steps = args.beam_length - 1
    for name in ("step_weights", "step_shares"):
        values = getattr(args, name)
        given = f"{flag(name)} {' '.join(map(str, values or []))}"
        if values is not None and len(values) != steps:
            raise UserError(f"{given}: expected {steps} numbers, one per draft step (--beam-length {args.beam_length})")
        if name == "step_weights" and values and not (min(values) >= 0 and 0 < sum(values) < math.inf):
            raise UserError(f"{given}: expected 0 or more, and not all of them 0")
        if name == "step_shares" and values:
            falling = all(values[k] >= values[k + 1] for k in range(steps - 1))
            if not (values[0] <= 1 and values[-1] > 0 and falling):
                raise UserError(f"{given}: expected numbers from 1 down to more than 0, none above the one before it")


def check_for(args: argparse.Namespace, target: Target) -> None:
    """Raises UserError for flags that do not fit the target."""
    for name in ("teacher_top_k", "draft_vocab_size"):
        if (getattr(args, name) or 0) > target.vocab_size:
            expected = f"expected at most {target.vocab_size}, the vocabulary"
            raise UserError(f"{flag(name)} is {getattr(args, name)}, {expected}")
    METHODS[args.method].check_for(args, target)
