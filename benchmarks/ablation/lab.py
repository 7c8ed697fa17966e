"""Trains recipes on what all of them share: the rows, and what the target made of them.

Knows nothing of what is measured afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import shutil
import time
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_redrafter.benchmarks.ablation.readings import View, read_all
from mlx_redrafter.benchmarks.ablation.recipes import LAYERS, Recipe, with_layers, words

from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.pairing import check_sizes
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.device import on_cpu
from mlx_redrafter.system.files import read_json, write_json
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.loading import find_drafter
from mlx_redrafter.training import command as train_command
from mlx_redrafter.training.drafters.kinds import METHODS
from mlx_redrafter.training.drafters.recipes import follow
from mlx_redrafter.training.drafters.vocabulary import frequent_tokens, vocab_map_of
from mlx_redrafter.training.flags import check, check_for, training_plan
from mlx_redrafter.training.loss import Objective
from mlx_redrafter.training.teacher import Teacher
from mlx_redrafter.training.text.shards import Rows
from mlx_redrafter.training.trainer import TrainingPlan, train
from mlx_redrafter.training.update import OFF

TRIAL = (2, 8)  # updates before a recipe's speed is measured, and for it


def flags_of(args: argparse.Namespace, recipe: Recipe, target: Target, work: pathlib.Path) -> argparse.Namespace:
    """A recipe as flags of `train`. Raises UserError where they do not go together."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    train_command.add_arguments(parser)
    begin = ["--out", str(work / recipe.name), "--eval-every", "0", "--dtype", "float32", "--compile", OFF]
    begin += ["--recipe", "plain"]  # recipes are the same whatever is usual
    own = with_layers(recipe.flags, target.num_layers)
    try:
        found, unknown = parser.parse_known_args([*begin, *words(args.train_flags, "--train-flags"), *own])
    except argparse.ArgumentError as error:
        raise UserError(f"recipe {recipe.name}: {error}") from error
    if unknown:
        raise UserError(f"recipe {recipe.name}: `mlx-redrafter train` has no {unknown[0]}")
    for name in METHODS[found.method].foreign:
        if f"--{name.replace('_', '-')}" not in own:
            setattr(found, name, parser.get_default(name))
    if found.loss not in ("kl", "lk") or not found.teacher_top_k:
        raise UserError(
            f"recipe {recipe.name}: --loss and --teacher-top-k: expected the target's most probable tokens,"
            " which all recipes share"
        )
    found.model = args.model
    follow(found)
    follow(found, target)
    check(found)
    check_for(found, target)
    return found


class Lab:
    """What all recipes share: the rows, and what the target made of them."""

    def __init__(
        self,
        args: argparse.Namespace,
        target: Target,
        tokenizer: Any,
        rows: Rows,
        common: argparse.Namespace,
        flags: list[argparse.Namespace],
        work: pathlib.Path,
    ):
        self.target, self.tokenizer, self.rows, self.seconds = target, tokenizer, rows, 60 * args.minutes
        learned = len(rows) - rows.held_out
        count = min(args.rows or learned, learned)
        self.picks = np.linspace(0, learned - 1, count).round().astype(np.int64)
        last = target.num_layers
        labels = {(f.teacher_top_k, f.teacher_temp) for f in flags}
        if len(labels) > 1:
            raise UserError("--recipes: --teacher-top-k and --teacher-temp differ, but all recipes share the readings")
        wanted = {layer for f in flags for layer in (f.context_layers or (last,))}
        with contextlib.suppress(UserError):  # of a target that tells of its last layer only
            usual = {int(layer) for layer in with_layers((LAYERS,), last)}
            target.check_layers(tuple(usual), "")
            wanted |= usual  # so that readings are the same whichever recipes are asked for
        self.layers = () if wanted == {last} else tuple(sorted(wanted))
        size = common.draft_vocab_size
        self.map = None if size is None else frequent_tokens(rows, size, target.vocab_size)
        if args.readings_of is not None:
            drafter = open_drafter(find_drafter(args.readings_of, "--readings-of"))
            check_sizes(target, drafter, f"--readings-of {args.readings_of}")
            self.map = vocab_map_of(drafter)
        budget = min(int(args.cache_gb * 2**30), shutil.disk_usage(work if work.exists() else ".").free)
        ((top_k, temp),) = labels
        objective = Objective(top_k=top_k, temperature=temp)
        self.teacher = Teacher(target, rows, objective, self.map, work / "readings", budget, self.layers)
        read_all(self.teacher, self.picks, budget)

    def train(self, recipe: Recipe, flags: argparse.Namespace) -> None:
        """Trains a recipe, or what is missing of it."""
        out = pathlib.Path(flags.out)
        said = {name: value for name, value in vars(flags).items() if name not in ("given", "out", "iters")}
        said = json.loads(json.dumps(said | {"seconds": self.seconds, "rows": len(self.picks)}))
        begun = read_json(out / "plan.json") if (out / "plan.json").exists() else None
        if begun is not None and begun["flags"] != said:
            raise UserError(f"{out}: was trained with other flags; remove it, or name another --work")
        if (out / "result.json").exists():
            print(f"{recipe.name}: trained already")
            return
        print(f"{recipe.name}: {recipe.words}")
        if begun is None:
            begun = {"flags": said, "iters": self._updates(flags, out)}
            write_json(out / "plan.json", begun)
        flags.iters, flags.save_every = begun["iters"], max(50, begun["iters"] // 4)
        drafter, start = self._new(flags), time.perf_counter()
        result = self._run(flags, drafter, out, training_plan(flags, on_cpu()))
        seconds = time.perf_counter() - start
        method = METHODS[flags.method]
        method.settle(flags, drafter, self.target, self.rows)
        method.save(flags, drafter, self.target, self.tokenizer, out)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][-20:]
        facts = {"updates": result.updates, "seconds": seconds, "positions_per_second": result.positions_per_second}
        facts["loss"] = float(np.mean([line["loss"] for line in lines]))
        facts["hits"] = np.mean([line["hits"] for line in lines], axis=0).tolist()
        write_json(out / "result.json", facts)
        (out / "checkpoint.safetensors").unlink(missing_ok=True)
        mx.clear_cache()

    def _new(self, flags: argparse.Namespace) -> Any:
        return METHODS[flags.method].new(flags, self.target, self.rows)

    def _run(self, flags: argparse.Namespace, drafter: Any, out: pathlib.Path, plan: TrainingPlan) -> Any:
        layers = getattr(drafter, "context_layers", ())
        view: Any = View(self.teacher, self.picks, plan.objective, layers, vocab_map_of(drafter), self.map)
        return train(METHODS[flags.method], drafter, view, plan, out, resume=True)

    def _updates(self, flags: argparse.Namespace, out: pathlib.Path) -> int:
        """How many updates the minutes have room for."""
        seconds: list[float] = []
        for iters in (TRIAL[0], sum(TRIAL)):
            if seconds and seconds[0] > self.seconds / 10:  # a long trial costs more than it tells
                return max(1, int(self.seconds * TRIAL[0] / seconds[0]))
            flags.iters, trial = iters, out / "trial"
            drafter, start = self._new(flags), time.perf_counter()
            self._run(flags, drafter, trial, training_plan(flags, on_cpu()))
            seconds.append(time.perf_counter() - start)
            shutil.rmtree(trial)
        each = max(1e-4, (seconds[1] - seconds[0]) / TRIAL[1])
        return max(1, int(self.seconds / each))
