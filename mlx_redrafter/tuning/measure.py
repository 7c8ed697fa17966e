"""Measures what a step costs on this device, through the real parts, in about two seconds.

Knows nothing of what is chosen from it. All times come from the loop's own step and KV
cache, submitted as the loop submits them, so that what hides behind the device's work there
is hidden here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_redrafter.decoding.step import DecodingOptions, SpeculativeStep, prefill
from mlx_redrafter.drafting.kinds import Drafter, proposer_for
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, Plan
from mlx_redrafter.target.cache.attention import BLOCK
from mlx_redrafter.target.cache.kv_cache import KVCache, leaves
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import CHAIN, Verifier
from mlx_redrafter.tuning.step_costs import Costs

ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
LONG_ROWS = (1, 4, 16, 32)  # a long context changes the time of rows smoothly
SHORT, LONG = 128, 2048  # tokens of context
WIDTHS, LENGTHS = (1, 2, 4, 8), (2, 5)
NODES = 8  # that the steps verify by which drafting is measured
SECONDS = 2.0  # no new round is begun after so long
LONG_BYTES = 512e6  # that a long context may take

Clock = Callable[[], float]


def measure(
    verifier: Verifier, drafter: Drafter | None, seconds: float | None = None, clock: Clock | None = None
) -> Costs:
    """Measures a pair on this device, or a target alone.

    Everything runs once before it counts, which makes room and compiles kernels. Then all
    measurements take turns in rounds, at least one, until the time is over; each counts with
    its fastest round, the one that other programs disturbed least.

    Args:
        verifier: with a capability other than "none".
        drafter: the target's, if there is one.
        seconds: after which no further round begins (default: SECONDS).
    """
    seconds, clock = SECONDS if seconds is None else seconds, clock or clock_for(verifier)
    limit = verifier.target.context_length or LONG
    short, long = min(SHORT, limit // 2), min(LONG, limit - 64)
    caches = {short: _cache(verifier, short)}
    # Where layers have windows or states, the context hardly shows, and would have to be read.
    room = sum(array.nbytes for array in caches[short].arrays()) * long / short
    if (ranks := verifier.target.ranks) is not None:
        room = ranks.share(room)
    if long > 2 * short and caches[short].can_rewind and room <= LONG_BYTES:
        caches[long] = _cache(verifier, long)
    runs: dict[tuple, Callable[[], float]] = {}
    for context, cache in caches.items():
        for rows in ROWS if context == short else LONG_ROWS:
            runs["verify", context, rows] = _verification(verifier, cache, rows, clock)
        runs["plain", context] = _steps(verifier, drafter, cache, PLAIN, context, clock)
    shapes = {} if drafter is None else _shapes(verifier, drafter)
    for key, shape in shapes.items():
        runs[("step", *key)] = _steps(verifier, drafter, caches[short], Drafted(shape), short, clock)
    begin = clock()
    for run in runs.values():
        run()
    times: dict[tuple, float] = {}
    while True:
        for name, run in runs.items():
            times[name] = min(run(), times.get(name, float("inf")))
        if clock() - begin >= seconds:
            break
    verify = {c: {rows: times["verify", c, rows] for rows in ROWS if ("verify", c, rows) in times} for c in caches}
    costs = Costs(verify, {c: times["plain", c] for c in caches}, {})
    for (width, length), shape in shapes.items():
        rows_alone = costs.verify_seconds(1 + shape.num_draft_tokens, short)
        costs.draft.setdefault(width, {})[length] = max(0.0, times["step", width, length] - rows_alone)
    del runs, caches, cache
    mx.clear_cache()
    return costs


def clock_for(verifier: Verifier) -> Clock:
    """This machine's clock; where the model is split, that of rank 0, so that all measure the same."""
    return time.perf_counter if verifier.target.ranks is None else verifier.target.ranks.clock


def _shapes(verifier: Verifier, drafter: Drafter) -> dict[tuple[int, int], DraftShape]:
    """The shapes whose steps are measured, by beam width and length."""
    widths = [w for w in WIDTHS if w == 1 or (verifier.capability != CHAIN and w <= drafter.widest)]
    return {(w, n): DraftShape(w, n, min(w * (n - 1), NODES)) for w in widths for n in LENGTHS}


def _cache(verifier: Verifier, tokens: int) -> KVCache:
    """A cache that holds so many rows; zeros where that can be, for their content is of no matter to the time."""
    cache = verifier.make_cache()
    prompt = mx.zeros((1, 1 if cache.can_rewind else tokens), mx.int32)
    _, logits = prefill(verifier.target, prompt, cache.layers, DecodingOptions())
    mx.eval(logits, cache.arrays())  # the next process of a pipeline waits for what this one computes
    if cache.can_rewind:
        room = -(-(tokens + 4 * max(ROWS)) // BLOCK) * BLOCK
        for layer in leaves(cache.layers):
            layer.map(lambda b: mx.zeros((*b.shape[:2], room, b.shape[3]), b.dtype))
            layer.offset = tokens
    cache.begin_trees(length=tokens)
    mx.eval(cache.arrays())
    return cache


def rows_tree(rows: int, chain: bool = False) -> CandidateTree:
    """A tree of so many rows, every node with two children (or one, in a chain); tokens are of no matter."""
    parents = tuple(max(0, i - 1 if chain else (i - 1) // 2) for i in range(rows))
    return CandidateTree.static(mx.zeros((1, rows), mx.int32), parents)


def _verification(verifier: Verifier, cache: KVCache, rows: int, clock: Clock) -> Callable[[], float]:
    """Times verifications of so many rows, two of them as the loop would submit them."""
    tree = rows_tree(rows, chain=verifier.capability == CHAIN)

    def run() -> float:
        begin = clock()
        for _ in range(2):
            hidden, logits = verifier(tree, cache)
            mx.async_eval(hidden, logits, *cache.arrays())
        mx.eval(hidden, logits)
        return (clock() - begin) / 2

    return run


def _steps(
    verifier: Verifier, drafter: Drafter | None, cache: KVCache, plan: Plan, context: int, clock: Clock
) -> Callable[[], float]:
    """Times whole greedy steps of a plan, two of them as the loop submits them."""
    proposer = proposer_for(drafter, verifier.target.embed)
    state = mx.zeros((1, 1, verifier.target.context_size(proposer.context_layers)), verifier.target.dtype)
    root = mx.zeros((1,), mx.int32)

    def run() -> float:
        if plan == PLAIN:
            cache.plain_rows(context)
        proposer.begin(mx.zeros((1, 1), mx.int32), root, state)
        step = SpeculativeStep(verifier, proposer, DecodingOptions(), cache, state, root)
        begin = clock()
        for _ in range(2):
            submitted = step.submit(plan)
        mx.eval(submitted.count, submitted.tokens, step.root, step.context)
        seconds = (clock() - begin) / 2
        if cache.can_rewind:  # back to where it was
            cache.plain_rows(context)
            cache.begin_trees()
        else:
            assert cache.length is not None
            length: Any = mx.max(cache.length).item()
            cache.tighten(length)
        return seconds

    return run
