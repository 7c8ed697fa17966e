"""Texts that repeat themselves or not, gone through with lookups step by step."""

import functools

import numpy as np

from mlx_redrafter.decoding.planner import StepRead
from mlx_redrafter.drafting.lookup import TextIndex
from mlx_redrafter.drafting.shape import Drafted, DraftShape, LookedUp
from mlx_redrafter.tuning.acceptance_model import DEEPEST, LookupMemory
from mlx_redrafter.tuning.shape_controller import LookupController

CHAIN = Drafted(DraftShape())
AGAIN = list(range(10)) * 400
FRESH = np.random.default_rng(0).integers(10_000, size=600).tolist()


class Rates:
    """What steps bring without lookup, and what lookups take: each row beyond the first costs a tenth of a step."""

    def __init__(self, tokens, slow_lookup=1.0):
        self.tokens, self.slow_lookup = tokens, slow_lookup

    def seconds(self, tokens, length):
        return 1 + 0.1 * tokens * self.slow_lookup

    def speed(self, length):
        return self.tokens / 1.3


def started(prompt, rates, mode="auto", memory=None, longest=DEEPEST):
    """A text that begins, and is looked up where that pays."""
    found = LookupController(TextIndex(prompt), mode, memory or LookupMemory(), rates.seconds, longest)
    found.plan = functools.partial(found.plan, speed_of=rates.speed)
    return found


def decode(controller, text, steps, accepts, plan=CHAIN):
    """Plays steps over a text; `accepts` of the drafter's tokens in each. Returns the plans."""
    found = []
    for _ in range(steps):
        chosen = controller.plan(plan, len(controller.index.tokens))
        lookups = isinstance(chosen, LookedUp) or (isinstance(chosen, Drafted) and chosen.with_lookup)
        lookup = controller.index.continuation(chosen.num_draft_tokens) if lookups else []
        at = len(controller.index.tokens)
        right = next((i for i, token in enumerate(lookup) if text[at + i] != token), len(lookup))
        accepted = right if isinstance(chosen, LookedUp) else max(accepts, right)
        tokens = text[at : at + accepted + 1]
        controller.index.extend(tokens)
        controller.learn(StepRead(chosen, tokens, at + len(tokens)))
        found.append(chosen)
    return found


def lookups(plans):
    return [isinstance(plan, LookedUp) for plan in plans]
