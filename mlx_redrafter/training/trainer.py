"""The training loop: batches, optimiser, evaluation, early stop."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any, TextIO

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map
from tqdm import tqdm

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.device import on_cpu
from mlx_redrafter.training.checkpoint import Progress, restore, save, save_weights
from mlx_redrafter.training.drafters.base import Method
from mlx_redrafter.training.fake_quant import as_seen
from mlx_redrafter.training.loss import Batch, distillation_loss
from mlx_redrafter.training.teacher import BatchMaker, Objective, Teacher

AUTO, ON, OFF = "auto", "on", "off"
LOG_EVERY = 10


@dataclasses.dataclass
class TrainingPlan:
    """What a run does.

    Args:
        iters: updates in all.
        batch_size: rows of text per update, in all processes together.
        accumulate: parts that a process's share of a batch is computed in, one after another.
        learning_rate: its peak, after the warm-up; a cosine takes it to a hundredth.
        warm_up: updates over which it rises.
        max_grad_norm: longer gradients are shortened to it.
        weight_decay: of AdamW.
        objective: what the head learns.
        dtype: the forward and backward pass compute in; weights are kept in float32.
        quantization: {"group_size", "bits"} to train for, None for none.
        compile: "on", "off", or "auto": on, except on a CPU for runs of fewer than 500 updates, or
            without the g++ that MLX needs there.
        seed: of the order of the rows and the choice of positions.
        save_every: updates between checkpoints.
        eval_every: updates between evaluations; 0 for none.
        patience: evaluations without a better one after which the run stops; 0 for no limit.
    """

    iters: int = 2000
    batch_size: int = 6
    accumulate: int = 1
    learning_rate: float = 2e-3
    warm_up: int = 50
    max_grad_norm: float = 1.0
    weight_decay: float = 0.01
    objective: Objective = dataclasses.field(default_factory=Objective)
    dtype: mx.Dtype = mx.float32
    quantization: dict[str, int] | None = None
    compile: str = OFF
    seed: int = 0
    save_every: int = 200
    eval_every: int = 0
    patience: int = 0


@dataclasses.dataclass
class TrainingResult:
    """What came of a run.

    Attributes:
        updates: made in all, those before a resumption included.
        best: the best evaluation, None if there was none.
        best_at: updates after which it was measured.
        positions_per_second: of text, in this process, reading with the target included and
            evaluations not.
    """

    updates: int
    best: float | None
    best_at: int
    positions_per_second: float


def train(
    method: Method,
    drafter: Any,
    teacher: Teacher,
    plan: TrainingPlan,
    folder: pathlib.Path,
    resume: bool = False,
    evaluate: Callable[[Any], float] | None = None,
) -> TrainingResult:
    """Trains a drafter in place; it ends as the best one that was evaluated, or the last.

    Batches depend on the seed and the update's number only, and a checkpoint holds weights,
    optimiser and counters, so a resumed run goes on as the interrupted one would have.
    In several processes (`mlx.launch`) each computes its rows of every batch and the
    gradients are averaged; the first one writes.

    Args:
        method: the kind of drafter it is.
        folder: gets log.jsonl, checkpoint.safetensors and best.safetensors.
        resume: go on from the checkpoint there, or begin where there is none yet.
        evaluate: higher is better.

    Raises:
        UserError: a checkpoint of another drafter, a batch that does not split, or a loss that
            is not a number (the last good checkpoint stays).
    """
    group = mx.distributed.init()
    parts = _parts(plan, group)
    make = BatchMaker(teacher, plan.seed, plan.dtype, method.reads_tokens)
    optimizer = optimizer_for(plan)
    drafter.unfreeze()
    weights = drafter.trainable_parameters()
    optimizer.init(weights)
    checkpoint = folder / "checkpoint.safetensors"
    progress = Progress()
    if resume and checkpoint.exists():
        weights, optimizer.state, progress = restore(checkpoint, weights)
    gradients_of, apply = _step(method, drafter, optimizer, plan)
    log = _Log(folder / "log.jsonl", progress.done, writes=group.rank() == 0)
    average: float | None = None
    with (
        log,
        tqdm(total=plan.iters, initial=progress.done, desc="training", unit="it", disable=group.rank() > 0) as bar,
    ):
        while progress.done < plan.iters and not progress.is_over(plan.patience):
            i = progress.done
            picks = row_picks(plan, i, len(teacher))
            total: Any = None
            for part in parts:
                batch = make(picks, i, part)
                found = gradients_of(weights, vars(batch))
                total = found if total is None else tree_map(mx.add, total, found)
                mx.eval(total)
            loss, hits, gradients = total
            if group.size() > 1:
                gradients = tree_map(lambda g: g * group.size(), nn.average_gradients(gradients, group))
                loss, hits = (mx.distributed.all_sum(x, group=group) for x in (loss, hits))
            weights, norm = apply(weights, gradients)
            mx.eval(weights, optimizer.state, loss, hits, norm)
            value = loss.item()
            if not np.isfinite(value) or not np.isfinite(norm.item()):
                raise UserError(_not_finite(value, i + 1, checkpoint, plan))
            average = value if average is None else 0.95 * average + 0.05 * value
            progress.done = done = i + 1
            log.count(plan.batch_size * make.kept[0])
            bar.set_postfix_str(
                f"loss {average:.3f}, hits {' '.join(f'{h:.0%}' for h in hits.tolist())}, {log.rate:.0f} tokens/s"
                + (f", acceptance {progress.best:.2f}" if progress.best is not None else ""),
                refresh=False,
            )
            bar.update()
            last = done == plan.iters
            facts = {"iter": done, "loss": value, "hits": hits.tolist(), "grad_norm": norm.item()}
            if evaluate is not None and plan.eval_every and (done % plan.eval_every == 0 or last):
                with log.paused():
                    drafter.update(weights)
                    facts["acceptance"] = evaluate(drafter)
                if progress.note(facts["acceptance"]) and group.rank() == 0:
                    save_weights(folder / "best.safetensors", weights)
            if done % LOG_EVERY == 0 or "acceptance" in facts or last:
                log.write(facts)
            if group.rank() == 0 and (done % plan.save_every == 0 or "acceptance" in facts or last):
                save(checkpoint, weights, optimizer.state, progress)
    best = folder / "best.safetensors"
    if progress.best is not None and best.exists():
        weights = restore(best, weights)[0]
    drafter.update(weights)
    drafter.freeze()
    return TrainingResult(progress.done, progress.best, progress.best_at, log.rate)


def row_picks(plan: TrainingPlan, update: int, rows: int) -> np.ndarray:
    """Which rows an update reads: a new shuffle of all rows each time they have been read."""
    wanted = np.arange(update * plan.batch_size, (update + 1) * plan.batch_size)
    picks = [np.random.default_rng((plan.seed, epoch)).permutation(rows) for epoch in np.unique(wanted // rows)]
    first = wanted[0] // rows
    return np.array([picks[w // rows - first][w % rows] for w in wanted])


def _parts(plan: TrainingPlan, group: Any) -> list[slice]:
    """This process's rows of a batch, part by part."""
    pieces = plan.accumulate * group.size()
    if plan.batch_size % pieces:
        processes = f" x {group.size()} processes" if group.size() > 1 else ""
        raise UserError(
            f"--batch-size is {plan.batch_size}, expected a multiple of {pieces}"
            f" (--grad-accumulation {plan.accumulate}{processes})"
        )
    size = plan.batch_size // pieces
    first = group.rank() * plan.accumulate
    return [slice((first + i) * size, (first + i + 1) * size) for i in range(plan.accumulate)]


def optimizer_for(plan: TrainingPlan) -> optim.Optimizer:
    """AdamW with a warm-up, and a cosine from the peak down to a hundredth of it."""
    rate, low = plan.learning_rate, plan.learning_rate / 100
    schedule = optim.cosine_decay(rate, max(1, plan.iters - plan.warm_up), low)
    if plan.warm_up:
        schedule = optim.join_schedules([optim.linear_schedule(low, rate, plan.warm_up), schedule], [plan.warm_up])
    return optim.AdamW(learning_rate=schedule, betas=[0.9, 0.95], weight_decay=plan.weight_decay)


def _step(method: Method, drafter: Any, optimizer: optim.Optimizer, plan: TrainingPlan) -> tuple[Callable, Callable]:
    """The two halves of an update, compiled where that is wanted: gradients, and what becomes of the weights."""

    def loss_of(weights: Any, parts: dict[str, Any]) -> tuple[mx.array, mx.array]:
        drafter.update(as_seen(weights, plan.dtype, plan.quantization))
        batch = Batch(**parts)
        return distillation_loss(method.scores(drafter, batch), batch, plan.objective.step_weights)

    value_and_grad = mx.value_and_grad(loss_of)

    def gradients_of(weights: Any, parts: dict[str, Any]) -> tuple[mx.array, mx.array, Any]:
        (loss, hits), gradients = value_and_grad(weights, parts)
        return loss, hits, gradients

    def apply(weights: Any, gradients: Any) -> tuple[Any, mx.array]:
        gradients, norm = optim.clip_grad_norm(gradients, plan.max_grad_norm)
        return optimizer.apply_gradients(gradients, weights), norm

    worth_it = not on_cpu() or (plan.iters >= 500 and shutil.which("g++"))
    if plan.compile == ON or (plan.compile == AUTO and worth_it):
        return mx.compile(gradients_of), mx.compile(apply, inputs=optimizer.state, outputs=optimizer.state)
    return gradients_of, apply


def _not_finite(loss: float, update: int, checkpoint: pathlib.Path, plan: TrainingPlan) -> str:
    kept = f"{checkpoint} holds the last good weights" if checkpoint.exists() else "nothing was saved yet"
    what = f"the loss is {loss}" if not np.isfinite(loss) else "the gradient is not finite"
    return (
        f"{what} at update {update}; {kept}; try a --learning-rate below {plan.learning_rate}"
        f"{'' if plan.dtype == mx.float32 else ' or --train-dtype float32'}"
    )


def begin_log(path: pathlib.Path, done: int) -> TextIO:
    """A log to go on writing to; lines after the checkpoint, the last one maybe cut short, will be written again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = ""
    if done and path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = "".join(line for line in lines if line.endswith("\n") and json.loads(line)["iter"] <= done)
    path.write_text(kept)
    return path.open("a")


class _Log:
    """log.jsonl, and the clock: positions of text per second, evaluations not counted."""

    def __init__(self, path: pathlib.Path, done: int, writes: bool):
        self._writes = writes
        self._positions, self._start = 0, time.perf_counter()
        if not writes:
            return
        self._file = begin_log(path, done)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            self._file.close()

    @property
    def rate(self) -> float:
        return self._positions / (time.perf_counter() - self._start)

    def count(self, positions: int) -> None:
        self._positions += positions

    def paused(self) -> _Pause:
        return _Pause(self)

    def write(self, facts: dict[str, Any]) -> None:
        if self._writes:
            facts |= {"positions_per_second": self.rate, "peak_memory_gb": mx.get_peak_memory() / 1e9}
            self._file.write(json.dumps(facts) + "\n")
            self._file.flush()


class _Pause:
    """Time inside the block does not count."""

    def __init__(self, log: _Log):
        self._log = log

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._log._start += time.perf_counter() - self._began
