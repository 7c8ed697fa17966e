"""Runs methods of decoding in turn on the same prompts, and sums up their speed, acceptance and equality.

Knows nothing of how a method decodes, of flags, or of models.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm.generate import generation_stream
from tqdm import tqdm

from mlx_redrafter.errors import UserError
from mlx_redrafter.system.table import Table
from mlx_redrafter.text.equality import Equality, compare_texts

_T = TypeVar("_T")
Method = Callable[[Any], Iterable]  # a prompt in, a stream of responses out (mlx-lm's or ours)


@dataclasses.dataclass
class Run:
    """One text. The round that reads the prompt is not counted: the clock and the steps begin after it.

    Attributes:
        tokens: all of them.
        seconds: from the end of the first round to the last token.
        steps: after the first round.
        before: tokens of the first round; more than one where drafts went along with the prompt.
        to_first: seconds until the first token.
        accepted: draft tokens accepted in each step.
        held: bytes that decoding held at most, beyond what was there before.
    """

    tokens: list[int]
    seconds: float
    steps: int
    before: int = 1
    to_first: float = 0.0
    accepted: list[int] = dataclasses.field(default_factory=list)
    held: int = 0

    @property
    def counted(self) -> int:
        """Tokens after the first round."""
        return len(self.tokens) - self.before

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / self.counted

    @property
    def acceptance(self) -> float:
        """Mean acceptance length."""
        return self.counted / self.steps


Runs = dict[str, list[list[Run]]]  # of each method: for each prompt, its runs


@dataclasses.dataclass
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def side_by_side(
    methods: Mapping[str, Method],
    prompts: Sequence[Any],
    repeats: int = 1,
    reference_every: int = 0,
    after: Callable[[Any], None] | None = None,
) -> Runs:
    """Runs every method on every prompt, method after method for each prompt.

    Every round begins with another method, so that none has a favoured place. Each method
    writes one text first that does not count: it warms caches up, and compiles.

    Args:
        methods: the first is the reference of the others.
        prompts: what the methods take.
        repeats: rounds per prompt.
        reference_every: with many methods, run the reference again after so many others, so
            that it is measured close to each of them; 0 once per round.
        after: called with the prompt at the end of each round.
    """
    runs: Runs = {name: [[] for _ in prompts] for name in methods}
    for method in methods.values():
        measure(method(prompts[0]))
    rounds = [i for i in range(len(prompts)) for _ in range(repeats)]
    plan = [(i, turn_order(list(methods), turn, reference_every)) for turn, i in enumerate(rounds)]
    with tqdm(total=sum(len(order) for _, order in plan), desc="measuring", unit="text", leave=False) as bar:
        for i, order in plan:
            for name in order:
                runs[name][i].append(measure(methods[name](prompts[i])))
                bar.update()
            if after is not None:
                after(prompts[i])
    return runs


def turn_order(names: list[_T], turn: int, reference_every: int = 0) -> list[_T]:
    """The order in which one round runs the methods; see `side_by_side`."""
    start = turn % len(names)
    if reference_every == 0:
        return names[start:] + names[:start]
    reference, *others = names
    start = turn % max(1, len(others))
    others = others[start:] + others[:start]
    order = []
    for at, name in enumerate(others):
        order += [reference, name] if at % reference_every == 0 else [name]
    return order or [reference]


def measure(stream: Iterable, show: Callable[[str, bool], object] | None = None) -> Run:
    """Takes a stream of responses to its end.

    A response that was not drafted ends a round, as in mlx_lm's and in our own streams.

    Args:
        show: is given each piece of text, and whether it had been drafted.
    """
    tokens, to_first, after_first, before = [], 0.0, 0.0, 0
    accepted: list[int] = []
    ended, response = True, None
    mx.reset_peak_memory()
    active, start = mx.get_active_memory(), time.perf_counter()
    for response in stream:
        tokens.append(response.token)
        if len(tokens) == 1:
            to_first = time.perf_counter() - start
        drafted = getattr(response, "from_draft", False)
        if before:
            accepted += [0] if ended else []
            accepted[-1] += drafted
            ended = not drafted
        elif not drafted:
            before, after_first = len(tokens), time.perf_counter()
        if show is not None:
            show(response.text, drafted)
    seconds = time.perf_counter() - after_first
    settle()
    steps = getattr(response, "steps", len(accepted))
    held = max(0, mx.get_peak_memory() - active)
    return Run(tokens, seconds, steps, before or len(tokens), to_first, accepted, held)


def settle() -> None:
    """Waits for steps that a loop has begun and not read, on its own stream or mlx-lm's.

    The next text would be computed beside them; and where a model is split, processes may send what belongs to two
    streams in different orders, which mixes them up.
    """
    for stream in (mx.default_stream(mx.default_device()), generation_stream):
        mx.synchronize(stream)


@dataclasses.dataclass
class Summary:
    """One method's figures. A text's own time is the median of its runs.

    Attributes:
        tokens_per_second: of all runs together.
        acceptance: mean acceptance length, tokens per step of all runs together.
        speed_up: the reference's time per token over this method's, text by text.
        efficiency: that speed-up over the mean acceptance length of that text (median).
        equal, runs: how many runs wrote the reference's text, of how many.
        speed_ups: by text; None for a text too short to be timed.
    """

    tokens_per_second: float
    acceptance: float
    speed_up: Spread
    efficiency: float
    equal: int
    runs: int
    speed_ups: list[float | None]


def summarize(runs: Runs) -> dict[str, Summary]:
    """Every method beside the first one.

    Texts of a single token took no measurable time and are left out of the ratios.

    Raises:
        UserError: where no other text is left.
    """
    base = next(iter(runs.values()))
    timed = [all(run.counted > 0 for each in runs.values() for run in each[i]) for i in range(len(base))]
    if not any(timed):
        raise UserError("--prompts: every text ended after its first token, so there is nothing to time")
    result = {}
    for name, texts in runs.items():
        flat = [run for i, text in enumerate(texts) if timed[i] for run in text]
        tokens, steps = sum(run.counted for run in flat), sum(run.steps for run in flat)
        ratios = [median_time(base[i]) / median_time(text) if timed[i] else None for i, text in enumerate(texts)]
        equality = compare_texts((plain[0].tokens, run.tokens) for plain, text in zip(base, texts) for run in text)
        efficiencies = [ratio / text[0].acceptance for ratio, text in zip(ratios, texts) if ratio is not None]
        result[name] = Summary(
            tokens / sum(run.seconds for run in flat),
            tokens / steps,
            Spread.of([ratio for ratio in ratios if ratio is not None]),
            statistics.median(efficiencies),
            equality.equal,
            equality.texts,
            ratios,
        )
    return result


def median_time(text: Sequence[Run]) -> float:
    """Seconds per token of one text, the median of its runs."""
    return statistics.median(run.seconds_per_token for run in text)


def equality_of(summaries: Mapping[str, Summary]) -> str:
    """How many texts of all methods but the first were the first's: "59 of 60"."""
    others = list(summaries.values())[1:]
    return str(Equality(sum(one.runs for one in others), sum(one.equal for one in others)))


def table(runs: Runs) -> Table:
    """The comparison in total tokens per second; speed-up is relative to the first method."""
    summaries = summarize(runs)
    plain = next(iter(summaries.values())).tokens_per_second
    rows = [
        [name, f"{one.tokens_per_second:.1f}", f"{one.acceptance:.2f}", f"{one.tokens_per_second / plain:.2f}x"]
        for name, one in summaries.items()
    ]
    note = f"Texts equal to the plain one, token for token: {equality_of(summaries)}"
    return Table("", ["", "tokens/s", "mean acceptance length", "speed-up"], rows, note)
