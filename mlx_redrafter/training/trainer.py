"""The training loop: batches, optimiser, checkpoints, acceptance on held-out prompts."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from tqdm import tqdm

from ..decoding import speculative
from ..drafter import RecurrentDrafter, save_drafter
from ..errors import UserError
from ..files import read_safetensors, replace_file
from ..loading import one_line
from ..sampling import greedy
from ..settings import DecodingOptions, DraftShape
from ..target import Target
from ..verification import NONE, Verifier
from .loss import TeacherReader, distillation_loss


@dataclasses.dataclass
class TrainingPlan:
    """What a run does.

    Args:
        iters: updates in all.
        batch_size: rows of text per update.
        learning_rate: its peak, after the warm-up; a cosine takes it to a hundredth.
        top_k: teacher tokens per position; 1 for hard labels.
        step_weights: weight of each draft step in the loss; their number is the number of
            steps that are unrolled.
        seed: of the order of the batches.
        save_every: updates between checkpoints.
        cache_bytes: memory for what the target made of the text, so that it reads each row once.
    """

    iters: int = 2000
    batch_size: int = 4
    learning_rate: float = 2e-3
    warm_up: int = 50
    top_k: int = 16
    step_weights: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7)
    seed: int = 0
    save_every: int = 200
    cache_bytes: int = 2 << 30


def train(
    target: Target,
    drafter: RecurrentDrafter,
    rows: np.ndarray,
    plan: TrainingPlan,
    out: pathlib.Path,
    resume: bool = False,
) -> None:
    """Trains a drafter in place and writes it, a log and checkpoints to a directory.

    The batches depend on the seed and the update's number only, so a resumed run goes on
    as the interrupted one would have.

    Args:
        target: frozen.
        rows: (R, T) int32 token ids.
        out: gets config.json, model.safetensors, and training/ with log.jsonl and checkpoint.safetensors.
        resume: go on from the checkpoint there, or begin where there is none yet.

    Raises:
        UserError: a checkpoint of another drafter, or a loss that is not a number (the last good
            checkpoint stays).
    """
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(plan.learning_rate / 100, plan.learning_rate, plan.warm_up),
            optim.cosine_decay(plan.learning_rate, max(1, plan.iters - plan.warm_up), plan.learning_rate / 100),
        ],
        [plan.warm_up],
    )
    optimizer = optim.AdamW(learning_rate=schedule, betas=[0.9, 0.95], weight_decay=0.01)
    drafter.unfreeze()
    optimizer.init(drafter.trainable_parameters())
    checkpoint = out / "training" / "checkpoint.safetensors"
    done = _restore(checkpoint, drafter, optimizer) if resume and checkpoint.exists() else 0

    def loss_of(hidden, embeddings, ids, shares):
        return distillation_loss(drafter, hidden, embeddings, ids, shares, list(plan.step_weights))

    read = TeacherReader(target, rows, plan.top_k, plan.cache_bytes)
    gradient_of = nn.value_and_grad(drafter, loss_of)
    log = out / "training" / "log.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    average, tic, positions = None, time.perf_counter(), 0
    with tqdm(total=plan.iters, initial=done, desc="training", unit="it") as bar, log.open("a") as lines:
        for i in range(done, plan.iters):
            batch = read(_picks(plan, i, len(rows)))
            mx.eval(batch)
            (loss, hits), gradients = gradient_of(*batch)
            gradients, _ = optim.clip_grad_norm(gradients, 1.0)
            optimizer.update(drafter, gradients)
            mx.eval(drafter.parameters(), optimizer.state, loss, hits)
            value = loss.item()
            if not np.isfinite(value):
                kept = f"{checkpoint} holds the last good weights" if checkpoint.exists() else "nothing was saved yet"
                raise UserError(
                    f"the loss is {value} at update {i + 1}; {kept}; try a --learning-rate below {plan.learning_rate}"
                )
            positions += plan.batch_size * (rows.shape[1] - len(plan.step_weights))
            average = value if average is None else 0.95 * average + 0.05 * value
            bar.update()
            if (i + 1) % 10 == 0:
                rate = positions / (time.perf_counter() - tic)
                bar.set_postfix_str(f"loss {average:.3f}, {rate:.0f} positions/s")
                facts = {"iter": i + 1, "loss": value, "hits": hits.tolist(), "positions_per_second": rate}
                lines.write(json.dumps(facts) + "\n")
                lines.flush()
            if (i + 1) % plan.save_every == 0 or i + 1 == plan.iters:
                _save(checkpoint, drafter, optimizer, i + 1)
                save_drafter(drafter, out)
    drafter.freeze()


def acceptance_length(
    target: Target, drafter: RecurrentDrafter, prompts: list[list[int]], shape: DraftShape, max_tokens: int
) -> float:
    """Mean acceptance length of real greedy decoding: tokens per step of the target.

    Args:
        prompts: token ids to continue.
        max_tokens: per prompt.
    """
    verifier = Verifier(target)
    if verifier.capability == NONE:
        raise UserError(f"this target cannot verify drafts: {verifier.reason}")
    steps = 0
    for prompt in prompts:
        options = DecodingOptions(greedy, max_tokens)
        produced = list(speculative(verifier, drafter, mx.array([prompt]), verifier.make_cache(), shape, options))
        steps += len(produced) - 1  # the first token is the prompt's
    return len(prompts) * (max_tokens - 1) / max(1, steps)


def _picks(plan: TrainingPlan, update: int, rows: int) -> np.ndarray:
    """Which rows an update reads: a new shuffle of all rows each time they have been read."""
    wanted = np.arange(update * plan.batch_size, (update + 1) * plan.batch_size)
    picks = [np.random.default_rng((plan.seed, epoch)).permutation(rows) for epoch in np.unique(wanted // rows)]
    first = wanted[0] // rows
    return np.array([picks[w // rows - first][w % rows] for w in wanted])


def _save(path: pathlib.Path, drafter: RecurrentDrafter, optimizer: optim.Optimizer, done: int) -> None:
    arrays = {f"drafter.{name}": value for name, value in dict(tree_flatten(drafter.parameters())).items()}
    arrays |= {f"optimizer.{name}": value for name, value in dict(tree_flatten(optimizer.state)).items()}
    with replace_file(path) as file:
        mx.save_safetensors(str(file), arrays, metadata={"done": str(done)})


def _restore(path: pathlib.Path, drafter: RecurrentDrafter, optimizer: optim.Optimizer) -> int:
    arrays = read_safetensors(path)
    metadata: Any = mx.load(str(path), return_metadata=True)[1]  # type: ignore[index]
    parts: dict[str, list] = {"drafter": [], "optimizer": []}
    try:
        for name, value in arrays.items():
            part, _, rest = name.partition(".")
            parts[part].append((rest, value))
        drafter.load_weights(parts["drafter"])
    except (KeyError, ValueError) as error:
        raise UserError(f"--resume: {path} is not of this drafter ({one_line(error)})") from error
    optimizer.state = tree_unflatten(parts["optimizer"])
    return int(metadata["done"])
