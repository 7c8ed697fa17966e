"""Watches the first tenth of a training, and says then what acceptance and speed-up it should end with.

Accuracies on held-out rows are measured a few times and followed to the end. What they mean for acceptance
is `tuning`'s model of it, and what that means for speed are the costs of steps measured here.
Knows nothing of flags.
"""

from __future__ import annotations

import copy
import dataclasses
import pathlib
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape
from mlx_redrafter.system.files import read_json, write_json
from mlx_redrafter.target.verification import Verifier
from mlx_redrafter.training.drafters.base import Method
from mlx_redrafter.training.forecast.curve import forecast, learned_by
from mlx_redrafter.training.loss import distillation_loss
from mlx_redrafter.training.teacher import Teacher
from mlx_redrafter.training.trainer import TrainingPlan
from mlx_redrafter.tuning.acceptance_model import AcceptanceModel
from mlx_redrafter.tuning.measure import measure
from mlx_redrafter.tuning.session import SHAPES
from mlx_redrafter.tuning.step_costs import Costs

POINTS, FIRST, LAST = 8, 0.02, 0.1  # how often, and from which share of the updates to which
LEAST_POINTS = 4
CONTEXT = 256  # tokens before a step whose time counts
WORTH_IT = 1.02  # speed-up over what there is now that is worth the rest of the time
REFERENCE = DraftShape(4, 5, 12)


class Outlook:
    """Measurements so far, which a file keeps for runs that go on.

    Args:
        stops: whether a training ends that is not expected to pay.
        file: for the measurements.
    """

    def __init__(
        self, method: Method, teacher: Teacher, plan: TrainingPlan, verifier: Verifier, stops: bool, file: pathlib.Path
    ):
        self.method, self.plan, self.verifier, self.stops, self.file = method, plan, verifier, stops, file
        # Of all that can be drafted, whatever an update's loss is over, and of answers alone.
        self.teacher = copy.copy(teacher)
        self.teacher.objective = dataclasses.replace(teacher.objective, candidates=0, prompts=False)
        shares = np.geomspace(FIRST, LAST, POINTS)
        self.updates = sorted({max(1, round(plan.iters * share)) for share in shares})
        self.found: dict[int, list[float]] = {}
        if file.exists():
            self.found = {int(at): hits for at, hits in read_json(file)["hits"].items()}

    def __call__(self, drafter: Any, done: int) -> bool:
        """Measures after `done` updates; whether the training is to end here."""
        self.found[done] = self._hits(drafter)
        write_json(self.file, {"hits": self.found})
        if done != self.updates[-1]:
            return False
        points = sorted(at for at in self.found if at <= done)
        if len(points) < LEAST_POINTS:
            print(f"\nExpected: {len(points)} measurements are too few to say; longer runs have more")
            return False
        costs = measure(self.verifier, drafter)
        said, pays = outlook(points, [self.found[at] for at in points], self.plan, costs, drafter.deepest)
        print(f"\n{said}{' Stopped here.' if self.stops and not pays else ''}")
        return self.stops and not pays

    def _hits(self, drafter: Any) -> list[float]:
        """The share of held-out positions where each draft step's first guess is the target's."""
        make = self.method.batches(drafter, self.teacher, self.plan.seed, self.plan.dtype)
        rows, hits, counts = self.teacher.rows, np.zeros(1), np.zeros(1)
        for row in range(len(rows) - rows.held_out, len(rows)):
            batch = make(np.array([row]), 0)  # the same positions every time
            _, right = distillation_loss(self.method.scores(drafter, batch), batch, self.plan.objective.step_weights)
            mx.eval(right)
            of = np.array(batch.counts)
            hits, counts = hits + np.array(right) * of, counts + of
        return (hits / counts).tolist()


def outlook(
    updates: list[int], hits: list[list[float]], plan: TrainingPlan, costs: Costs, deepest: int
) -> tuple[str, bool]:
    """What is expected at the end, in words, and whether going on pays.

    Args:
        updates: after which was measured.
        hits: of each, the share of right first guesses by draft step.
        deepest: draft tokens in a row that the drafter can propose.
    """
    learned = learned_by([*updates, plan.iters], plan.iters, plan.warm_up)
    steps = [forecast(learned[:-1], np.array(curve), learned[-1]) for curve in zip(*hits, strict=True)]
    shapes = [shape for shape in SHAPES if shape.beam_length <= deepest + 1]
    ends = [list(end) for end in zip(*steps, strict=True)]
    low, middle, high = (_best(end, shapes, costs) for end in ends)
    now = _best(hits[-1], shapes, costs)
    tokens = [1 + AcceptanceModel(end).expected(REFERENCE) for end in ends]
    if low[0] > now[0] * WORTH_IT and low[0] > 1:
        pays, verdict = True, "Going on pays."
    elif middle[0] > max(1.0, now[0] * WORTH_IT):
        pays, verdict = True, "Going on probably pays."
    elif middle[0] <= 1:
        pays, verdict = False, "Going on does not pay: decoding plainly is expected to be as fast on this device."
    else:
        pays, verdict = False, "Going on does not pay: there is little more to be won."
    words = (
        f"Expected after {plan.iters:,} updates, from the first {updates[-1]:,}:"
        f" {tokens[1]:.2f} tokens per step with 12 draft tokens ({tokens[0]:.2f} to {tokens[2]:.2f} in 8 of 10 cases);"
        f" {middle[0]:.2f}x plain decoding on this device ({low[0]:.2f} to {high[0]:.2f}), with a {middle[1]};"
        f" now {now[0]:.2f}x. {verdict}"
    )
    return words, pays


def _best(hits: list[float], shapes: list[DraftShape], costs: Costs) -> tuple[float, DraftShape]:
    """The highest speed-up that accuracies by depth give, and with which shape."""
    model, plain = AcceptanceModel(hits), costs.step_seconds(PLAIN, CONTEXT)
    speeds = [(1 + model.expected(shape)) * plain / costs.step_seconds(Drafted(shape), CONTEXT) for shape in shapes]
    best = int(np.argmax(speeds))
    return speeds[best], shapes[best]
