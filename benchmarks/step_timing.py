"""Times the parts of a step: its stages, the rows of a verification alone, the device without the host.

Knows nothing of texts or tables. MLX runs asynchronously, so a stage has a time of its own only
behind barriers, which a real step does not have. So there are three kinds of figures here:

- behind barriers (`stages`): every stage is built, submitted and waited for alone. Their
  sum is more than a step;
- built before (`device_times`, `Rows`): the graphs exist before the clock starts and are
  submitted one behind the other, so only the device's own time is left, with the submission;
- as it runs (`step_times`): from one step's tokens to the next one's in the real loop.

What the real loop takes beyond the second kind is time in which the device waited for the
host. On a CPU, MLX starts a step while it is still being built (`submit_part`); here the
two are kept apart.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from mlx_redrafter.decoding.sampling import draft_temperature, greedy
from mlx_redrafter.decoding.step import DecodingOptions, SpeculativeStep, prefill
from mlx_redrafter.drafting.kinds import Drafter, proposer_for
from mlx_redrafter.drafting.shape import Plan
from mlx_redrafter.system.module_slots import StandIn
from mlx_redrafter.target.cache.attention import in_one_piece
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import CHAIN, Verifier
from mlx_redrafter.tuning.measure import rows_tree

STAGES = ("draft", "verify", "accept and commit")
AT_ONCE = 4  # graphs built before the clock starts; more would make attention read far past the committed rows


class Rows:
    """Verifications of M rows behind a fixed context, and nothing else.

    Args:
        verifier: with a capability other than "none".
        context: token ids the cache holds.
    """

    def __init__(self, verifier: Verifier, context: list[int]):
        self.verifier = verifier
        self.cache = verifier.make_cache()
        prefill(verifier.target, mx.array([context], mx.int32), self.cache.layers, DecodingOptions())
        self.cache.begin_trees()
        mx.eval(self.cache.arrays())

    def seconds(self, rows: int, calls: int = AT_ONCE) -> float:
        """Time of one verification of a tree of so many rows, the mean of `calls` in a row."""
        tree = rows_tree(rows, chain=self.verifier.capability == CHAIN)
        outputs = []
        with in_one_piece():
            for _ in range(calls):
                hidden, logits = self.verifier(tree, self.cache)
                outputs.append([hidden, logits, *self.cache.arrays()])
        return _submit_all(outputs) / calls


def begin(verifier: Verifier, drafter: Drafter, prompt: list[int]) -> tuple[SpeculativeStep, int]:
    """A greedy step that stands behind a prompt, nothing pending, and the rows that are committed."""
    options = DecodingOptions()
    cache = verifier.make_cache()
    proposer, text = (
        proposer_for(drafter, verifier.target.embed, draft_temperature(greedy)),
        mx.array([prompt], mx.int32),
    )
    reads = proposer.context_layers, proposer.prefix_window
    hidden, logits = prefill(verifier.target, text, cache.layers, options, *reads)
    cache.begin_trees()
    assert cache.length is not None and hidden is not None
    root = options.choose(logits[:, None], cache.length[:, None])[:, 0]
    mx.eval(root, hidden, *cache.arrays())
    proposer.begin(text, root, hidden)
    return SpeculativeStep(verifier, proposer, options, cache, hidden, root), len(prompt)


def device_times(step: SpeculativeStep, committed: int, plan: Plan, steps: int) -> tuple[list[float], list[float]]:
    """Real steps, each built before the clock starts.

    Returns:
        seconds on the device per step, and seconds of building its graph on the host; a
        value per block of `AT_ONCE` steps.
    """
    device, host = [], []
    for _ in range(-(-steps // AT_ONCE)):
        tic = time.perf_counter()
        outputs, counts = [], []
        with in_one_piece():
            for _ in range(AT_ONCE):
                submitted = step(plan)
                counts.append(submitted.count)
                outputs.append([submitted.count, submitted.tokens, step.root, step.context, *step.cache.arrays()])
        host.append((time.perf_counter() - tic) / AT_ONCE)
        device.append(_submit_all(outputs) / AT_ONCE)
        committed += AT_ONCE + _whole(mx.sum(mx.concatenate(counts)))
        step.cache.tighten(committed)
    return device, host


def stages(step: SpeculativeStep, committed: int, plan: Plan, steps: int) -> list[dict[str, tuple[float, float]]]:
    """Real steps with a barrier behind each stage.

    Returns:
        for each step and stage, seconds of building its graph and of running it.
    """
    found = []
    barriers = _Barriers(step.verifier)
    step.verifier = barriers  # type: ignore[assignment]  # it is called in the same way
    for _ in range(steps):
        barriers.start()
        with in_one_piece():
            submitted = step(plan)
        barriers.stop(submitted.count, submitted.tokens, step.root, step.context, *step.cache.arrays())
        found.append(dict(zip(STAGES, barriers.times, strict=True)))
        committed += 1 + _whole(submitted.count)
        step.cache.tighten(committed)
    return found


class _Barriers(StandIn):
    """Stands in for a step's verifier: what comes before it is drafting, what comes after acceptance and commit.

    It hangs in no slot, so a call of it is one in every thread.
    """

    def __init__(self, verifier: Verifier):
        super().__init__(verifier)  # type: ignore[arg-type]  # no module, but called as one
        self.times: list[tuple[float, float]] = []
        self._tic = 0.0

    def __call__(
        self, tree: CandidateTree, cache: Any, context_layers: tuple[int, ...] = ()
    ) -> tuple[mx.array, mx.array]:
        self.stop(tree.tokens, tree.parents, tree.depths, tree.ancestors, tree.valid)
        hidden, logits = self.module(tree, cache, context_layers)
        self.stop(hidden, logits, *cache.arrays())
        return hidden, logits

    def start(self) -> None:
        self.times = []
        self._tic = time.perf_counter()

    def stop(self, *arrays: mx.array) -> None:
        """Ends a stage: notes how long its graph took to build, then runs it to the end."""
        built = time.perf_counter()
        mx.eval(*arrays)
        done = time.perf_counter()
        self.times.append((built - self._tic, done - built))
        self._tic = time.perf_counter()


def step_times(stream: Iterable) -> list[float]:
    """Seconds from each step's tokens to the next one's, of a stream of responses (ours or mlx-lm's).

    The first step began before the prompt's token was handed out, and is left out.
    """
    arrivals: list[float] = []
    for tokens, response in enumerate(stream):
        if getattr(response, "steps", tokens) > len(arrivals):
            arrivals.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(arrivals)]


def _whole(number: mx.array) -> int:
    """The host's copy of one whole number."""
    value: Any = number.item()
    return value


def _submit_all(graphs: list[list[mx.array]]) -> float:
    """Seconds from submitting the first of some graphs to the end of the last; empties the list.

    What the loop does with each step: all of its results are submitted together, and nobody
    holds the one before's any more, so that buffers are updated in place.
    """
    tic = time.perf_counter()
    while graphs:
        arrays = graphs.pop(0)
        mx.async_eval(arrays)
    mx.eval(arrays)
    return time.perf_counter() - tic
