"""A device whose steps take the time that made-up costs say, and a drafter that is right with a probability."""

import functools

import numpy as np

from mlx_redrafter.decoding.planner import StepRead
from mlx_redrafter.drafting.shape import PLAIN, Drafted
from mlx_redrafter.tuning.acceptance_model import FIRST, NEXT, AcceptanceModel
from mlx_redrafter.tuning.pair_memory import PairMemory
from mlx_redrafter.tuning.session import SHAPES
from mlx_redrafter.tuning.shape_controller import Controller
from support.costs import made_up

COSTS = made_up(lambda rows: 1 + 0.05 * (rows - 1), lambda w, n: (0.05 + 0.005 * w) * (n - 1))
PLANS = [PLAIN, *map(Drafted, SHAPES)]


def new_memory(costs=COSTS, plans=PLANS):
    """A pair of which only costs are known."""
    return PairMemory(costs, AcceptanceModel(), plans)


def choice(memory):
    """What a text that begins now is drafted for with."""
    return Controller(memory).current.plan


def seconds(quality):
    """Shares of right second, third, ... children where those before were wrong."""
    return [share * min(1.0, quality / FIRST) for share in NEXT]


@functools.cache
def nodes_of(shape, quality):
    """The rows of a best-first tree, each by the ranks on its path; parents first, siblings by rank."""
    level, nodes = [(1.0, ())], []
    for _ in range(shape.beam_length - 1):
        children = []
        for share, path in level:
            for rank, right in enumerate((quality, *seconds(quality))[: shape.beam_width]):
                children.append((share * right, (*path, rank)))
                share *= 1 - right
        level = sorted(children, reverse=True)[: shape.beam_width]
        nodes += level
    best = sorted(nodes, key=lambda node: (-node[0], len(node[1]), node[1]))[: shape.num_draft_tokens]
    return [(), *sorted((path for _, path in best), key=lambda path: (len(path), path))]


class Device:
    """Runs steps whose best drafts are right with a probability, in the time that `costs` says."""

    def __init__(self, memory, costs=COSTS, seed=0):
        self.memory, self.costs, self.now = memory, costs, 0.0
        self.rng = np.random.default_rng(seed)
        self.plans = []

    def step(self, plan, quality, length=128):
        if plan == PLAIN:
            return StepRead(plan, [1], length)
        rows, at, path = nodes_of(plan.shape, quality), (), [0]
        while (at := (*at, self.right_rank(quality))) in rows:
            path.append(rows.index(at))
        tokens = [1] * len(path)
        if plan.shape.beam_width == 1:
            return StepRead(plan, tokens, length)
        return StepRead(plan, tokens, length, path, [0] + [rows.index(row[:-1]) for row in rows[1:]])

    def right_rank(self, quality):
        """Of the children of a right node, the one that is right."""
        for rank, share in enumerate((quality, *seconds(quality))):
            if self.rng.random() < share:
                return rank
        return None

    def write(self, tokens, quality, pause=lambda: 0.0):
        """One text; returns its seconds. The next step is always planned before the last is known."""
        controller = self.controller = Controller(self.memory, clock=lambda: self.now)
        made, begin = 0, self.now
        following = controller.plan()
        while made < tokens:
            plan, following = following, controller.plan()
            self.plans.append(plan)
            step = self.step(plan, quality)
            self.now += self.costs.step_seconds(plan, 128) * self.rng.uniform(0.95, 1.1) + pause()
            made += len(step.tokens)
            controller.learn(StepRead(plan, step.tokens, 128 + made, step.path, step.parents))
        return (self.now - begin) * tokens / made

    def speed_of(self, plan, quality, tokens=20000):
        """Tokens per second of a fixed plan."""
        steps, made = 0, 0
        while made < tokens:
            made, steps = made + len(self.step(plan, quality).tokens), steps + 1
        return made / steps / self.costs.step_seconds(plan, 128) / 1.025
