"""`mlx-redrafter train`: trains a drafter for a target, on the machine that will run it.

Knows nothing of how text is made, nor of how a kind of drafter learns.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.device import on_cpu
from mlx_redrafter.system.files import remove_left_over, require_free, write_json
from mlx_redrafter.system.hub import require_login, upload
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import Verifier
from mlx_redrafter.text.loading import find_target, is_embedded, load_target
from mlx_redrafter.training.acceptance_length import held_out_prompts
from mlx_redrafter.training.drafters.kinds import METHODS
from mlx_redrafter.training.drafters.recipes import follow
from mlx_redrafter.training.drafters.vocabulary import vocab_map_of
from mlx_redrafter.training.flags import STOP, add_arguments, check, check_for, data_plan, training_plan
from mlx_redrafter.training.forecast.outlook import Outlook
from mlx_redrafter.training.report import EVALUATED_TOKENS, report
from mlx_redrafter.training.resume import arguments_of, earlier_rows, forget, resumed
from mlx_redrafter.training.teacher import Teacher
from mlx_redrafter.training.text.shards import Rows
from mlx_redrafter.training.text.sources import check_length, prepare
from mlx_redrafter.training.trainer import TrainingPlan, TrainingResult, train

__all__ = ["HELP", "add_arguments", "run"]

HELP = "train a drafter for a target on text that the target writes itself"


def run(args: argparse.Namespace) -> None:
    """Writes or reads text, trains, measures acceptance, and leaves a drafter with its card in --out."""
    if args.resume:
        args = resumed(args)
    else:
        follow(args)
    check(args)
    plan_of_data, method = data_plan(args), METHODS[args.method]
    out, notes = pathlib.Path(args.out), pathlib.Path(args.out) / "training"
    first = mx.distributed.init().rank() == 0
    if not args.resume and first:
        if (notes / "arguments.json").exists():
            raise UserError(f"{out}: already exists: a run was begun there; add --resume, or name a new directory")
        require_free(out)
    if args.upload_repo is not None and first:
        require_login(args.upload_repo)
    folder = find_target(args.model, "--model", args.gguf)
    # Half precision is slow and coarse on a CPU.
    model, tokenizer = load_target(folder, None, "float32" if on_cpu() else None, None, args.trust_remote_code)
    verifier = verifier_of(model).checked(f"--model {args.model}:")
    target = verifier.target
    if not args.resume or "recipe" in args.given:
        follow(args, target)
    check_for(args, target)
    rows = None if args.text is None else earlier_rows(args.text, target, tokenizer, method.steps(args))
    drafter = None if args.init is None else method.earlier(args, target, tokenizer)
    if rows is None:
        check_length(plan_of_data, target)
    plan = training_plan(args, on_cpu())

    def begin() -> None:
        for place in (out, notes):
            remove_left_over(place)
        write_json(notes / "arguments.json", arguments_of(args), indent=1)  # shows early that --out can be written
        if args.text is None:
            try:
                prepare(notes / "text", target, tokenizer, plan_of_data, embedded=is_embedded(args.model))
            except UserError as error:
                if not args.resume:
                    forget(out, notes, args, error)
                raise

    _first_then_all(begin)
    rows = Rows(notes / "text") if rows is None else rows
    model.freeze()
    drafter = method.new(args, target, rows) if drafter is None else drafter
    method.settle(args, drafter, target, rows)  # shows early that the held-out rows are good for it
    result = _train(args, plan, drafter, verifier, rows, notes)
    if not first:
        return
    method.save(args, drafter, target, tokenizer, out)
    report(args, plan, result, target, rows, out)
    if args.upload_repo is not None:
        print(f"{args.upload_repo}: uploaded, see {upload(out, args.upload_repo, str(out), ignore=['training/*'])}")


def _train(
    args: argparse.Namespace, plan: TrainingPlan, drafter: Any, verifier: Verifier, rows: Rows, notes: pathlib.Path
) -> TrainingResult:
    method, target = METHODS[args.method], verifier.target
    readings = notes / f"readings-{mx.distributed.init().rank()}"
    budget = min(int(args.cache_gb * 2**30), shutil.disk_usage(notes).free // 2)
    layers = getattr(drafter, "context_layers", ())  # a draft model reads none
    teacher = Teacher(target, rows, plan.objective, vocab_map_of(drafter), readings, budget, layers)
    prompts = held_out_prompts(rows, args.prefix_length)

    def evaluate(current: Any) -> float:
        method.settle(args, current, target, rows)
        return method.acceptance(args, current, target, prompts, EVALUATED_TOKENS)

    watch = None
    if args.expected:
        outlook = Outlook(method, teacher, plan, verifier, args.expected == STOP, notes / "expected.json")
        watch = (outlook.updates, outlook)
    result = train(method, drafter, teacher, plan, notes, args.resume, evaluate if plan.eval_every else None, watch)
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
