"""`mlx-redrafter train`: a drafter for a target, on the machine that will run it."""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_redrafter.drafting.drafter_files import save_head
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.device import on_cpu
from mlx_redrafter.system.files import remove_left_over, replace_file, require_free
from mlx_redrafter.system.hub import fetch, require_login, upload
from mlx_redrafter.target.fingerprint import fingerprint
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import NONE
from mlx_redrafter.text.loading import EMBEDDED, load_target
from mlx_redrafter.training.acceptance_length import acceptance_length, held_out_prompts
from mlx_redrafter.training.drafters.kinds import METHODS
from mlx_redrafter.training.flags import add_arguments, check, check_for, data_plan, training_plan
from mlx_redrafter.training.report import EVALUATED_TOKENS, report
from mlx_redrafter.training.resume import arguments_of, check_resumed, earlier_drafter, earlier_rows
from mlx_redrafter.training.teacher import Teacher
from mlx_redrafter.training.text.shards import Rows
from mlx_redrafter.training.text.sources import check_length, prepare
from mlx_redrafter.training.trainer import TrainingPlan, TrainingResult, train
from mlx_redrafter.training.vocabulary import vocab_map_of

__all__ = ["HELP", "add_arguments", "run"]

HELP = "train a drafter for a target on text that the target writes itself"


def run(args: argparse.Namespace) -> None:
    """Writes or reads text, trains, measures acceptance, and leaves a drafter with its card in --out."""
    check(args)
    plan_of_data, method = data_plan(args), METHODS[args.method]
    out, notes = pathlib.Path(args.out), pathlib.Path(args.out) / "training"
    first = mx.distributed.init().rank() == 0
    if args.resume:
        check_resumed(args, notes / "arguments.json")
    elif first:
        require_free(out)
    if args.upload_repo is not None and first:
        require_login(args.upload_repo)
    folder = EMBEDDED / "target" if args.model is None else fetch(args.model, "--model")
    dtype = "float32" if on_cpu() else None  # half precision is slow and coarse there
    model, tokenizer = load_target(folder, None, dtype, None, args.trust_remote_code)
    verifier = verifier_of(model)
    if verifier.capability == NONE:
        raise UserError(f"--model {args.model}: cannot verify drafts: {verifier.reason}")
    target = verifier.target
    check_for(args, target)
    if args.text is None:
        check_length(plan_of_data, target)
    plan = training_plan(args, on_cpu())

    def begin() -> None:
        for place in (out, notes):
            remove_left_over(place)
        with replace_file(notes / "arguments.json") as file:  # shows early that --out can be written
            file.write_text(json.dumps(arguments_of(args), indent=1) + "\n")
        if args.text is None:
            prepare(notes / "text", target, tokenizer, plan_of_data, embedded=args.model is None)

    _first_then_all(begin)
    rows = Rows(notes / "text") if args.text is None else earlier_rows(args.text, target, tokenizer, args.beam_length)
    model.freeze()
    drafter = earlier_drafter(args, target) if args.init is not None else method.new(args, target, rows)
    method.settle(args, drafter, target, rows)  # shows early that the held-out rows are good for it
    drafter.config.target_fingerprint = fingerprint(target, tokenizer, args.model or "the embedded target")
    result = _train(args, plan, drafter, target, rows, notes)
    if not first:
        return
    drafter.set_dtype(getattr(mx, args.dtype))
    if args.q_bits is not None:
        method.quantize(drafter, args.q_group_size, args.q_bits)
    save_head(drafter, out)
    report(args, plan, result, target, rows, out)
    if args.upload_repo is not None:
        print(f"{args.upload_repo}: uploaded, see {upload(out, args.upload_repo, str(out), ignore=['training/*'])}")


def _train(
    args: argparse.Namespace, plan: TrainingPlan, drafter: Any, target: Target, rows: Rows, notes: pathlib.Path
) -> TrainingResult:
    method = METHODS[args.method]
    readings = notes / f"readings-{mx.distributed.init().rank()}"
    budget = min(int(args.cache_gb * 2**30), shutil.disk_usage(notes).free // 2)
    teacher = Teacher(target, rows, plan.objective, vocab_map_of(drafter), readings, budget)
    prompts, (shape, _) = held_out_prompts(rows, args.prefix_length), method.shape(args)

    def evaluate(current: Any) -> float:
        method.settle(args, current, target, rows)
        return acceptance_length(target, current, prompts, shape, EVALUATED_TOKENS)

    result = train(method, drafter, teacher, plan, notes, args.resume, evaluate if plan.eval_every else None)
    teacher.close()
    shutil.rmtree(readings, ignore_errors=True)
    method.settle(args, drafter, target, rows)
    return result


def _first_then_all(work: Callable[[], None]) -> None:
    """The first process does it, the others wait for it; if it fails, all stop."""
    group = mx.distributed.init()
    failed: UserError | None = None
    if group.rank() == 0:
        try:
            work()
        except UserError as error:
            failed = error
    if group.size() > 1 and mx.distributed.all_sum(mx.array(float(failed is not None)), group=group).item():
        raise failed or UserError("the first process could not begin; its message says why")
    if failed is not None:
        raise failed
