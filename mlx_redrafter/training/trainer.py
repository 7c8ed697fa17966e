"""The training loop: batches, updates, log, checkpoints, evaluation, early stop.

Knows nothing of flags, nor of how a kind of drafter computes its scores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from tqdm import tqdm

from mlx_redrafter.errors import UserError
from mlx_redrafter.training.batches import thinned
from mlx_redrafter.training.checkpoint import Progress, restore, save
from mlx_redrafter.training.drafters.base import Method
from mlx_redrafter.training.loss import Batch, Objective, distillation_loss
from mlx_redrafter.training.teacher import Teacher
from mlx_redrafter.training.update import OFF, as_seen, compiled_steps, optimizer_for
from mlx_redrafter.tuning.acceptance_model import RunningShare

LOG_EVERY = 10


@dataclasses.dataclass
class TrainingPlan:
    """What a run does: mostly what the flags of `mlx-redrafter train` of the same names say.

    Args:
        batch_size: rows of text per update, in all processes together.
        grad_accumulation: parts that a process's share of a batch is computed in, one after another.
        dropout: share of the numbers that a drafter reads that are left out; see `thinned`.
        warm_up: updates over which the learning rate rises to its peak; a cosine takes it to a hundredth.
        dtype: the forward and backward pass compute in; weights are kept in float32.
        quantization: {"group_size", "bits"} to train for, None for none.
        seed: of the order of the rows and the choice of positions.
    """

    iters: int = 2000
    batch_size: int = 6
    grad_accumulation: int = 1
    learning_rate: float = 2e-3
    warm_up: int = 50
    max_grad_norm: float = 1.0
    weight_decay: float = 0.01
    dropout: float = 0.0
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
    """What came of a run; the best evaluation is None if there was none.

    Attributes:
        updates: made in all, those before a resumption included.
        positions_per_second: of text, in this process, reading with the target included and
            evaluations not.
    """

    updates: int
    best: float | None
    best_at: int  # updates after which it was measured
    positions_per_second: float


def train(
    method: Method,
    drafter: Any,
    teacher: Teacher,
    plan: TrainingPlan,
    folder: pathlib.Path,
    resume: bool = False,
    evaluate: Callable[[Any], float] | None = None,
    watch: tuple[Sequence[int], Callable[[Any, int], bool]] | None = None,
) -> TrainingResult:
    """Trains a drafter in place; it ends as the best one that was evaluated, or the last.

    Batches depend on the seed and the update's number only, and a checkpoint holds weights,
    optimiser and counters, so a resumed run goes on as the interrupted one would have.
    In several processes (`mlx.launch`) each computes its rows of every batch and the
    gradients are averaged; the first one writes.

    Args:
        folder: gets log.jsonl, checkpoint.safetensors and best.safetensors.
        resume: go on from the checkpoint there, or begin where there is none yet.
        evaluate: higher is better.
        watch: is called with the drafter after these updates; whether the training ends there. Its time does not count.

    Raises:
        UserError: a checkpoint of another drafter, a batch that does not split, or a loss that
            is not a number (the last good checkpoint stays).
    """
    group = mx.distributed.init()
    first = group.rank() == 0
    parts = parts_of(plan.batch_size, plan.grad_accumulation, group)
    make = method.batches(drafter, teacher, plan.seed, plan.dtype)
    optimizer = optimizer_for(plan.iters, plan.learning_rate, plan.warm_up, plan.weight_decay)
    drafter.unfreeze()
    drafter.train()
    weights = drafter.trainable_parameters()
    optimizer.init(weights)
    checkpoint, best = folder / "checkpoint.safetensors", folder / "best.safetensors"
    progress = Progress()
    if resume and checkpoint.exists():
        weights, optimizer.state, progress = restore(checkpoint, weights)

    def loss_of(weights: Any, parts: dict[str, Any]) -> tuple[mx.array, mx.array]:
        drafter.update(as_seen(weights, plan.dtype, plan.quantization))
        batch, objective = Batch(**parts), plan.objective
        return distillation_loss(method.scores(drafter, batch), batch, objective.step_weights, objective.labels)

    gradients_of, apply = compiled_steps(loss_of, optimizer, plan.max_grad_norm, plan.compile, plan.iters)
    log = _Log(folder / "log.jsonl", progress.done, first)
    average = RunningShare(0, 20)
    looks, look = watch or ((), None)
    ended = False
    with tqdm(total=plan.iters, initial=progress.done, desc="training", unit="it", disable=not first) as bar:
        while progress.done < plan.iters and not ended and not progress.is_over(plan.patience):
            i = progress.done
            picks = row_picks(plan, i, len(teacher))
            total: Any = None
            for part in parts:
                batch = thinned(make(picks, i, part), plan.dropout, (plan.seed, i, part.start or 0))
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
            average.learn(value)
            progress.done = done = i + 1
            log.count(plan.batch_size * make.positions_per_row)
            shown = " ".join(f"{h:.0%}" for h in hits.tolist())
            bar.set_postfix_str(
                f"loss {average.share(0):.3f}, hits {shown}, {log.rate:.0f} tokens/s"
                + (f", acceptance {progress.best:.2f}" if progress.best is not None else ""),
                refresh=False,
            )
            bar.update()
            last = done == plan.iters
            facts = {"iter": done, "loss": value, "hits": hits.tolist(), "grad_norm": norm.item()}
            if evaluate is not None and plan.eval_every and (done % plan.eval_every == 0 or last):
                with log.paused():
                    drafter.update(weights)
                    drafter.eval()
                    facts["acceptance"] = evaluate(drafter)
                    drafter.train()
                if progress.note(facts["acceptance"]) and first:
                    save(best, weights, {}, Progress())
            if look is not None and done in looks:
                with log.paused():
                    drafter.update(weights)
                    drafter.eval()
                    ended = look(drafter, done)
                    drafter.train()
            last = last or ended
            if first and (done % LOG_EVERY == 0 or "acceptance" in facts or last):
                log.note(facts)
            if first and (done % plan.save_every == 0 or "acceptance" in facts or last):
                save(checkpoint, weights, optimizer.state, progress)
    if progress.best is not None and best.exists():
        weights = restore(best, weights)[0]
    drafter.update(weights)
    drafter.freeze()
    drafter.eval()
    return TrainingResult(progress.done, progress.best, progress.best_at, log.rate)


def row_picks(plan: TrainingPlan, update: int, rows: int) -> np.ndarray:
    """Which rows an update reads: a new shuffle of all rows each time they have been read."""
    wanted = np.arange(update * plan.batch_size, (update + 1) * plan.batch_size)
    picks = [np.random.default_rng((plan.seed, epoch)).permutation(rows) for epoch in np.unique(wanted // rows)]
    first = wanted[0] // rows
    return np.array([picks[w // rows - first][w % rows] for w in wanted])


def parts_of(batch_size: int, accumulate: int, group: Any) -> list[slice]:
    """This process's rows of a batch, part by part. Raises UserError for a batch that does not split evenly."""
    pieces = accumulate * group.size()
    if batch_size % pieces:
        processes = f" x {group.size()} processes" if group.size() > 1 else ""
        expected = f"expected a multiple of {pieces} (--grad-accumulation {accumulate}{processes})"
        raise UserError(f"--batch-size is {batch_size}, {expected}")
    size = batch_size // pieces
    first = group.rank() * accumulate
    return [slice((first + i) * size, (first + i + 1) * size) for i in range(accumulate)]


def _not_finite(loss: float, update: int, checkpoint: pathlib.Path, plan: TrainingPlan) -> str:
    kept = f"{checkpoint} holds the last good weights" if checkpoint.exists() else "nothing was saved yet"
    what = f"the loss is {loss}" if not np.isfinite(loss) else "the gradient is not finite"
    return (
        f"{what} at update {update}; {kept}; try a --learning-rate below {plan.learning_rate}"
        f"{'' if plan.dtype == mx.float32 else ' or --train-dtype float32'}"
    )


class _Log:
    """log.jsonl, and the clock: positions of text per second, evaluations not counted.

    Lines after the checkpoint, the last one maybe cut short, are dropped: they will be written again.
    """

    def __init__(self, path: pathlib.Path, done: int, writes: bool):
        self._path, self._positions, self._start = path, 0, time.perf_counter()
        if not writes:
            return
        with _written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text("utf-8").splitlines(keepends=True) if done and path.exists() else []
            path.write_text("".join(x for x in lines if x.endswith("\n") and json.loads(x)["iter"] <= done), "utf-8")

    @property
    def rate(self) -> float:
        return self._positions / (time.perf_counter() - self._start)

    def count(self, positions: int) -> None:
        self._positions += positions

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block does not count."""
        began = time.perf_counter()
        yield
        self._start += time.perf_counter() - began

    def note(self, facts: dict[str, Any]) -> None:
        facts |= {"positions_per_second": self.rate, "peak_memory_gb": mx.get_peak_memory() / 1e9}
        with _written(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")


@contextlib.contextmanager
def _written(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
