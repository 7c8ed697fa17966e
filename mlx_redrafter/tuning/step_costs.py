"""What a step costs on this device: measured through the real parts, in about two seconds.

Three tables tell the time of a step of any shape: of verifying M rows behind a short and a
long context, of what a step takes beyond its rows (drafting, choosing nodes, accepting,
moving rows together) by beam width and length, and of a plain step. All come from the
loop's own step and KV cache, submitted as the loop submits them, so that what hides behind
the device's work there is hidden here.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_redrafter.decoding.options import DecodingOptions
from mlx_redrafter.decoding.step import SpeculativeStep, prefill
from mlx_redrafter.drafting.kinds import Drafter, proposer_for
from mlx_redrafter.drafting.shape import DraftShape, LookupChain
from mlx_redrafter.target.cache.attention import BLOCK
from mlx_redrafter.target.cache.kv_cache import KVCache, leaves
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import CHAIN, Verifier

ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
LONG_ROWS = (1, 4, 16, 32)  # a long context changes the time of rows smoothly
SHORT, LONG = 128, 2048  # tokens of context
WIDTHS, LENGTHS = (1, 2, 4, 8), (2, 5)
NODES = 8  # that the steps verify by which drafting is measured
SECONDS = 2.0  # no new round is begun after so long
LONG_BYTES = 512e6  # that a long context may take


@dataclasses.dataclass
class Costs:
    """Seconds of the parts of a step.

    Attributes:
        verify: by tokens of context, then by rows.
        plain: of a plain step, by tokens of context.
        draft: what a step takes beyond its rows, by beam width, then by beam length.
    """

    verify: dict[int, dict[int, float]]
    plain: dict[int, float]
    draft: dict[int, dict[int, float]]

    def verify_seconds(self, rows: int, context: int) -> float:
        """Of one verification of so many rows; between the measured points on a straight line."""
        return _line({at: _between(times, rows) for at, times in self.verify.items()}, context)

    def draft_seconds(self, width: int, length: int) -> float:
        """Of everything in a step but its rows."""
        return max(0.0, _between({w: _line(times, length) for w, times in self.draft.items()}, width))

    def undrafted_seconds(self) -> float:
        """Of what a step of a chain takes beyond its rows and its draft tokens; looking text up is little beside it."""
        times = self.draft[min(self.draft)]
        short, long = min(times), max(times)
        each = (times[long] - times[short]) / (long - short) if long > short else 0.0
        return max(0.0, times[short] - each * (short - 1))

    def step_seconds(self, shape: DraftShape | None, context: int) -> float:
        """Of a whole step behind so many tokens of context; None stands for a plain one."""
        if shape is None:
            return _line(self.plain, context)
        rows = self.verify_seconds(1 + shape.num_draft_tokens, context)
        if isinstance(shape, LookupChain):
            return rows + self.undrafted_seconds()
        return rows + self.draft_seconds(shape.beam_width, shape.beam_length)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> Costs:
        """Reads what `to_dict` gave, after JSON made its keys strings.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: anything else.
        """
        verify = {int(c): {int(m): float(s) for m, s in t.items()} for c, t in fields["verify"].items()}
        draft = {int(w): {int(n): float(s) for n, s in t.items()} for w, t in fields["draft"].items()}
        costs = cls(verify, {int(c): float(s) for c, s in fields["plain"].items()}, draft)
        seconds = [*costs.plain.values(), *(s for table in verify.values() for s in table.values())]
        if not (costs.plain and verify and draft and all(verify.values()) and all(draft.values())):
            raise ValueError("an empty table")
        if not all(0 < s < float("inf") for s in seconds):
            raise ValueError("times that are none")
        return costs


def _between(times: dict[int, float], at: int) -> float:
    """On straight lines between measured points; as the nearest one outside of them."""
    points = sorted(times)
    return float(np.interp(at, points, [times[point] for point in points]))


def _line(times: dict[int, float], at: int) -> float:
    """On the straight line through the first and the last point, beyond the last one, too."""
    low, high = min(times), max(times)
    if low == high:
        return times[low]
    return times[low] + (times[high] - times[low]) * max(0.0, (at - low) / (high - low))


def measure(
    verifier: Verifier, drafter: Drafter, seconds: float | None = None, clock: Callable[[], float] = time.perf_counter
) -> Costs:
    """Measures a pair on this device.

    Everything runs once before it counts, which makes room and compiles kernels. Then all
    measurements take turns in rounds, at least one, until the time is over; each counts with
    its fastest round, the one that other programs disturbed least.

    Args:
        verifier: with a capability other than "none".
        drafter: the target's.
        seconds: after which no further round begins (default: SECONDS).
    """
    seconds = SECONDS if seconds is None else seconds
    limit = verifier.target.context_length or LONG
    short, long = min(SHORT, limit // 2), min(LONG, limit - 64)
    caches = {short: _cache(verifier, short)}
    # Where layers have windows or states, the context hardly shows, and would have to be read.
    room = sum(array.nbytes for array in caches[short].arrays()) * long / short
    if long > 2 * short and caches[short].can_rewind and room <= LONG_BYTES:
        caches[long] = _cache(verifier, long)
    runs: dict[tuple, Callable[[], float]] = {}
    for context, cache in caches.items():
        for rows in ROWS if context == short else LONG_ROWS:
            runs["verify", context, rows] = _verification(verifier, cache, rows, clock)
        runs["plain", context] = _steps(verifier, drafter, cache, None, context, clock)
    shapes = {}
    for width in WIDTHS:
        if width == 1 or (verifier.capability != CHAIN and width <= drafter.config.scored):
            for length in LENGTHS:
                shapes[width, length] = DraftShape(width, length, min(width * (length - 1), NODES))
                runs["step", width, length] = _steps(
                    verifier, drafter, caches[short], shapes[width, length], short, clock
                )
    begin = clock()
    for run in runs.values():
        run()
    found: dict[tuple, list[float]] = {name: [] for name in runs}
    while True:
        for name, run in runs.items():
            found[name].append(run())
        if clock() - begin >= seconds:
            break
    times = {name: min(each) for name, each in found.items()}
    costs = Costs(
        {c: {rows: times["verify", c, rows] for rows in ROWS if ("verify", c, rows) in times} for c in caches},
        {c: times["plain", c] for c in caches},
        {},
    )
    for (width, length), shape in shapes.items():
        rows_alone = costs.verify_seconds(1 + shape.num_draft_tokens, short)
        costs.draft.setdefault(width, {})[length] = max(0.0, times["step", width, length] - rows_alone)
    del runs, caches, cache
    mx.clear_cache()
    return costs


def _cache(verifier: Verifier, tokens: int) -> KVCache:
    """A cache that holds so many rows; zeros where that can be, for their content is of no matter to the time."""
    cache = verifier.make_cache()
    prompt = mx.zeros((1, 1 if cache.can_rewind else tokens), mx.int32)
    prefill(verifier.target, prompt, cache.layers, DecodingOptions())
    if cache.can_rewind:
        room = -(-(tokens + 4 * max(ROWS)) // BLOCK) * BLOCK
        for layer in leaves(cache.layers):
            layer.map(lambda b: mx.zeros((*b.shape[:2], room, b.shape[3]), b.dtype))
            layer.offset = tokens
    cache.begin_trees(length=tokens)
    mx.eval(cache.arrays())
    return cache


def _rewind(cache: KVCache, tokens: int) -> None:
    """Back to so many tokens, or, where that cannot be, to what was committed."""
    if cache.can_rewind:
        cache.plain_rows(tokens)
        cache.begin_trees()
    else:
        assert cache.length is not None
        length: Any = cache.length.item()
        cache.tighten(length)


def _verification(verifier: Verifier, cache: KVCache, rows: int, clock: Callable[[], float]) -> Callable[[], float]:
    """Times verifications of so many rows, two of them as the loop would submit them."""
    chain = verifier.capability == CHAIN
    parents = tuple(max(0, i - 1 if chain else (i - 1) // 2) for i in range(rows))
    tree = CandidateTree.static(mx.zeros((1, rows), mx.int32), parents)

    def run() -> float:
        begin = clock()
        for _ in range(2):
            hidden, logits = verifier(tree, cache)
            mx.async_eval(hidden, logits, *cache.arrays())
        mx.eval(hidden, logits)
        return (clock() - begin) / 2

    return run


def _steps(
    verifier: Verifier,
    drafter: Drafter,
    cache: KVCache,
    shape: DraftShape | None,
    context: int,
    clock: Callable[[], float],
) -> Callable[[], float]:
    """Times whole greedy steps of a shape, two of them as the loop submits them."""
    proposer = proposer_for(drafter, verifier.target.embed, shape)
    state = mx.zeros((1, verifier.target.hidden_size), verifier.target.dtype)
    root = mx.zeros((1,), mx.int32)

    def run() -> float:
        if shape is None:
            cache.plain_rows(context)
        step = SpeculativeStep(verifier, proposer, DecodingOptions(), cache, state, root)
        begin = clock()
        for _ in range(2):
            submitted = step.submit()
        mx.eval(submitted.arrays(), step.root, step.context)
        seconds = (clock() - begin) / 2
        _rewind(cache, context)
        return seconds

    return run
