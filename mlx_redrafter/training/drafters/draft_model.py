"""Trains a small mlx-lm model to be a target's draft model, on rows that the target wrote.

It learns the target's distribution (its most probable tokens) at every position that is to
be learned, so a peer of the drafter can have the same text and the same time:

    python -m mlx_redrafter.training.drafters.draft_model OUT --init DIR --text ROWS --iters 4000
    python -m mlx_redrafter.training.drafters.draft_model OUT --init DIR --text ROWS --iters 4000 --resume

--init is any unquantised mlx-lm model with the target's tokenizer; OUT becomes such a
model, for `mlx_lm.generate --draft-model OUT`. ROWS is what `mlx-redrafter train` leaves in
training/text.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import save_config, save_model
from tqdm import tqdm

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.files import read_json, replace_file, require_free
from mlx_redrafter.system.hub import fetch
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.loading import EMBEDDED, load_target
from mlx_redrafter.training.checkpoint import Progress, restore, save
from mlx_redrafter.training.drafters.base import flag
from mlx_redrafter.training.loss import soft_cross_entropy
from mlx_redrafter.training.teacher import Objective, Teacher
from mlx_redrafter.training.text.rendering import Renderer
from mlx_redrafter.training.text.shards import Rows
from mlx_redrafter.training.trainer import TrainingPlan, begin_log, optimizer_for, row_picks

LOG_EVERY = 20


@dataclasses.dataclass
class Result:
    """What came of a run.

    Attributes:
        updates: made in all.
        held_out: cross-entropy with the target's distribution on the held-out rows, in nats,
            and the share of their positions where both have the same first choice.
        positions_per_second: of text, reading with the target included.
    """

    updates: int
    held_out: tuple[float, float]
    positions_per_second: float


def train_draft_model(
    model: nn.Module, teacher: Teacher, plan: TrainingPlan, folder: pathlib.Path, resume: bool = False
) -> Result:
    """Trains a model in place.

    Which rows an update reads depends on the seed and its number only, so a resumed run goes
    on as the interrupted one would have.

    Args:
        model: unquantised, float32, with the target's vocabulary.
        teacher: of the target's most probable tokens, for all of its vocabulary.
        plan: iters, batch_size, learning_rate, warm_up, max_grad_norm, weight_decay, seed, save_every.
        folder: gets log.jsonl and checkpoint.safetensors.
        resume: go on from the checkpoint there, or begin where there is none yet.

    Raises:
        UserError: a checkpoint of another model, or a loss that is not a number.
    """
    model.train()
    model.unfreeze()
    optimizer = optimizer_for(plan)
    weights, progress = model.trainable_parameters(), Progress()
    optimizer.init(weights)
    checkpoint = folder / "checkpoint.safetensors"
    if resume and checkpoint.exists():
        weights, optimizer.state, progress = restore(checkpoint, weights)
        model.update(weights)
    value_and_grad = nn.value_and_grad(model, lambda *batch: _loss(model, *batch))
    start, seen = time.perf_counter(), 0
    folder.mkdir(parents=True, exist_ok=True)
    with (
        begin_log(folder / "log.jsonl", progress.done) as log,
        tqdm(total=plan.iters, initial=progress.done, desc="training", unit="it") as bar,
    ):
        while progress.done < plan.iters:
            tokens, *labels = _batch(teacher, row_picks(plan, progress.done, len(teacher)))
            (loss, hits), gradients = value_and_grad(tokens, *labels)
            gradients, norm = optim.clip_grad_norm(gradients, plan.max_grad_norm)
            optimizer.update(model, gradients)
            mx.eval(model.parameters(), optimizer.state, loss, hits, norm)
            if not np.isfinite(loss.item()) or not np.isfinite(norm.item()):
                raise UserError(f"--learning-rate {plan.learning_rate}: the loss is {loss.item()}; try a lower one")
            progress.done, seen = progress.done + 1, seen + tokens.size
            rate = seen / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {loss.item():.3f}, hits {hits.item():.0%}, {rate:.0f} tokens/s", refresh=False)
            bar.update()
            last = progress.done == plan.iters
            if last or progress.done % LOG_EVERY == 0:
                facts = {"iter": progress.done, "loss": loss.item(), "hits": hits.item(), "positions_per_second": rate}
                log.write(json.dumps(facts) + "\n")
                log.flush()
            if last or progress.done % plan.save_every == 0:
                save(checkpoint, model.trainable_parameters(), optimizer.state, progress)
    model.eval()
    return Result(progress.done, _held_out(model, teacher), seen / (time.perf_counter() - start))


def _batch(teacher: Teacher, picks: np.ndarray) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Tokens (B, T), and for every position the target's tokens and their shares (B, T, j), and whether it counts.

    A position counts where the token after it is to be learned: the target's words there are
    about the same document.
    """
    counts = teacher.rows[picks][1]
    tokens, reading = teacher.read(picks)
    learned = np.concatenate([counts[:, 1:], np.zeros((len(counts), 1), bool)], axis=1)
    ids = np.arange(teacher.size) if reading.ids is None else reading.ids
    ids = np.broadcast_to(ids, reading.shares.shape).astype(np.int32)
    return mx.array(tokens), mx.array(ids), mx.array(reading.shares.astype(np.float32)), mx.array(learned)


def _loss(
    model: nn.Module, tokens: mx.array, ids: mx.array, shares: mx.array, learned: mx.array
) -> tuple[mx.array, mx.array]:
    """Mean cross-entropy in nats, and the share of positions where both have the same first choice."""
    logits = model(tokens).astype(mx.float32)
    flat = logits.reshape(-1, logits.shape[-1])
    entropy = soft_cross_entropy(flat, ids.reshape(len(flat), -1), shares.reshape(len(flat), -1))
    counted: Any = learned.reshape(-1).astype(mx.float32)
    total = mx.maximum(mx.sum(counted), 1)
    wanted = mx.take_along_axis(ids, mx.argmax(shares, axis=-1, keepdims=True), axis=-1)
    agree: Any = mx.argmax(logits, axis=-1, keepdims=True) == wanted
    return mx.sum(entropy * counted) / total, mx.sum(agree.reshape(-1) * counted) / total


def _held_out(model: nn.Module, teacher: Teacher) -> tuple[float, float]:
    rows = np.arange(len(teacher), len(teacher.rows))
    if not len(rows):
        return float("nan"), float("nan")
    loss, hits = _loss(model, *_batch(teacher, rows))
    return float(loss.item()), float(hits.item())  # type: ignore[arg-type]


def run(args: argparse.Namespace) -> None:
    """Loads both models, trains, and leaves an mlx-lm model in OUT.

    Raises:
        UserError: by the name of the flag that is wrong; the model's files are written last.
    """
    out, notes = pathlib.Path(args.out), pathlib.Path(args.out) / "training"
    settings = {name: str(getattr(args, name)) for name in SETTINGS}
    for name, least in (("iters", 1), ("batch_size", 1), ("top_k", 1), ("save_every", 1), ("warm_up", 0)):
        if getattr(args, name) < least:
            raise UserError(f"{flag(name)} is {getattr(args, name)}, expected {least} or more")
    if args.resume:
        begun = read_json(notes / "arguments.json")
        for name, value in settings.items():
            if begun.get(name) != value:
                raise UserError(f"{flag(name)} is {value}, but the run to resume has {begun.get(name)}")
    else:
        require_free(out)
    target_model, tokenizer = load_target(
        EMBEDDED / "target" if args.model is None else fetch(args.model, "--model"), None, "float32"
    )
    source = fetch(args.init, "--init")
    model, own = load_target(source, None, "float32")
    target, rows = Target.of(target_model), Rows(args.text)
    _check(args, target, tokenizer, model, own, rows)
    with replace_file(notes / "arguments.json") as file:
        file.write_text(json.dumps(settings, indent=1) + "\n")
    target_model.freeze()
    objective = Objective(top_k=args.top_k)
    readings = notes / "readings"
    budget = min(int(args.cache_gb * 2**30), shutil.disk_usage(notes).free // 2)
    teacher = Teacher(target, rows, objective, None, readings, budget)
    plan = TrainingPlan(
        args.iters,
        args.batch_size,
        learning_rate=args.learning_rate,
        warm_up=min(args.warm_up, args.iters),
        objective=objective,
        save_every=args.save_every,
    )
    result = train_draft_model(model, teacher, plan, notes, args.resume)
    teacher.close()
    shutil.rmtree(readings, ignore_errors=True)
    model.set_dtype(getattr(mx, args.dtype))
    save_model(out, model)
    save_config(read_json(source / "config.json") | {"torch_dtype": args.dtype}, out / "config.json")
    own.save_pretrained(out)
    facts = dataclasses.asdict(result) | settings
    with replace_file(notes / "result.json") as file:
        file.write_text(json.dumps(facts, indent=1) + "\n")
    print(
        f"{out}: on {rows.held_out} held-out rows {result.held_out[0]:.3f} nats per token against the target's"
        f" distribution, the target's first choice at {result.held_out[1]:.1%} of the positions;"
        f" {result.positions_per_second:.0f} tokens/s of text learned"
    )


def _check(
    args: argparse.Namespace, target: Target, tokenizer: TokenizerWrapper, model: nn.Module, own: Any, rows: Rows
) -> None:
    """Raises UserError unless target, draft model and text speak the same tokens."""
    if target.missing:
        raise UserError(f"--model {args.model}: cannot be read by a teacher: {target.missing}")
    draft = Target.of(model)
    if draft.vocab_size != target.vocab_size:
        raise UserError(f"--init {args.init}: vocabulary of {draft.vocab_size}, the target's is {target.vocab_size}")
    mark = Renderer(tokenizer).fingerprint()
    if Renderer(own).fingerprint() != mark:
        raise UserError(f"--init {args.init}: its tokenizer is another than the target's")
    if rows.manifest["settings"].get("tokenizer") != mark:
        raise UserError(f"--text {args.text}: its rows were cut by another tokenizer than the target's")
    if any(name.endswith(".scales") for name in dict(tree_flatten(model.parameters()))):
        raise UserError(f"--init {args.init}: is quantised, expected weights in full")


SETTINGS = ("model", "init", "text", "iters", "batch_size", "top_k", "learning_rate", "warm_up", "dtype")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_redrafter.training.drafters.draft_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("out", metavar="OUT", help="directory of the model to write")
    add("--init", required=True, metavar="DIR", help="mlx-lm model to go on from")
    add("--text", required=True, metavar="ROWS", help="rows that the target wrote")
    add("--model", metavar="DIR", help="the target (default: the embedded one)")
    add("--iters", type=int, default=4000, help="updates (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="rows per update (default: %(default)s)")
    add("--learning-rate", type=float, default=2e-3, help="after the warm-up (default: %(default)s)")
    add("--warm-up", type=int, default=100, help="updates over which it rises (default: %(default)s)")
    add("--top-k", type=int, default=16, help="the target's tokens to learn from (default: %(default)s)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16", help="of the file's weights")
    add("--save-every", type=int, default=200, help="updates between checkpoints (default: %(default)s)")
    add("--cache-gb", type=float, default=8.0, help="disk for the target's readings (default: %(default)s)")
    add("--resume", action="store_true", help="go on from OUT's checkpoint")
    try:
        run(parser.parse_args(argv))
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
