"""How often drafted texts equal plain ones, and whether rounding explains those that do not.

Knows nothing of types of weights. In float32 all have to be equal. Elsewhere one row and
several rows are computed with other rounding, so two nearly equal tokens may change places. How
far that goes on a device shows without any drafting: the same text is read once more, all tokens
together, by mlx-lm alone. A text may leave the plain one only between tokens closer than that.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm

from mlx_redrafter.decoding.sampling import position_keyed
from mlx_redrafter.doctor.checks import FAILED, NOTE, OK, REPORT, Check
from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.text.equality import Equality
from mlx_redrafter.text.generate import stream_generate

SHAPES = (DraftShape(), DraftShape(4, 5, 7))
TOKENS = 32  # per text
SECONDS = 5.0  # no further prompt is begun after so long, per type of weights
SAMPLED = position_keyed(0.8, seed=11)
FEW = 1e-4  # nats that any rounding may make
PROMPTS = (
    "import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, path):\n",
    "def mean(values):\n    ",
    "The capital of France is",
    "    try:\n        result = self._call(name, *args)\n    except ValueError as error:\n",
    "for line in file:\n    key, value = line.split(",
    "Once upon a time there was a small",
)
TF32_ADVICE = (
    "float32 products are rounded to fewer bits here (see above): set MLX_ENABLE_TF32=0 before the program"
    " starts, and texts in float32 are equal; if they still are not, " + REPORT
)


@dataclasses.dataclass
class Closeness(Equality):
    """What was found with one type of weights; nats at most."""

    gap: float = 0.0  # how much less probable a token was than the one in its place
    rounding: float = 0.0  # between log-probabilities of plain decoding and of the same tokens read together
    unexplained: int = 0  # texts whose gap rounding does not explain


Texts = Callable[[list[int], DraftShape | None], tuple[list[int], list[mx.array]]]


def greedy_texts(model: nn.Module, drafter: Drafter, tokenizer: Any) -> Texts:
    """Texts of mlx_lm (shape None) and ours, with each token's log-probabilities."""

    def write(prompt: list[int], shape: DraftShape | None) -> tuple[list[int], list[mx.array]]:
        stream: Any
        if shape is None:
            stream = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=TOKENS)
        else:
            stream = stream_generate(model, tokenizer, prompt, drafter, max_tokens=TOKENS, shape=shape)
        found = [(response.token, response.logprobs) for response in stream]
        return [token for token, _ in found], [row for _, row in found]

    return write


def measure(
    write: Texts, model: nn.Module, prompts: Sequence[list[int]], shapes: Sequence[DraftShape] = SHAPES
) -> Closeness:
    """Writes each prompt's text plainly and drafted; begins no further one after SECONDS.

    Args:
        write: a prompt's tokens and log-probabilities by shape; None for plain decoding.
        prompts: token ids.
    """
    found, begin = Closeness(), time.perf_counter()
    for prompt in prompts:
        plain, log_probs = write(prompt, None)
        found.rounding = max(found.rounding, _rounding(model, prompt, plain, log_probs))
        gaps = []
        for shape in shapes:
            drafted, _ = write(prompt, shape)
            if (at := found.add(plain, drafted)) is not None:
                gaps.append(_gap(plain, drafted, log_probs, at))
        found.gap = max([found.gap, *gaps])
        # Both of two tokens move by rounding; what another prompt shows may be a little more.
        found.unexplained += sum(gap > 3 * found.rounding + FEW for gap in gaps)
        if time.perf_counter() - begin > SECONDS:
            break
    return found


def _gap(plain: list[int], drafted: list[int], log_probs: list[mx.array], at: int) -> float:
    """Nats between two texts' tokens where they part; infinite where one of them just ends."""
    if at >= min(len(plain), len(drafted)):
        return float("inf")
    value: Any = (log_probs[at][plain[at]] - log_probs[at][drafted[at]]).astype(mx.float32).item()
    return float(value) if value == value else float("inf")


def _rounding(model: nn.Module, prompt: list[int], text: list[int], log_probs: list[mx.array]) -> float:
    """How far plain decoding's log-probabilities are from those of one pass over the whole text."""
    logits = model(mx.array([[*prompt, *text[:-1]]]))[0, len(prompt) - 1 :].astype(mx.float32)
    together = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    stepwise = mx.stack(log_probs).astype(mx.float32)
    # What a model rules out (-inf) and what hardly ever comes is of no matter to a choice.
    likely = together > mx.max(together, axis=-1, keepdims=True) - 10
    value: Any = mx.where(likely, mx.abs(together - stepwise), 0).max().item()
    return float(value)


def greedy_check(name: str, found: Closeness, exact: bool, reduced: bool) -> Check:
    """The verdict on greedy texts.

    Args:
        exact: these weights promise equal texts.
        reduced: the device rounds float32 products to fewer bits.
    """
    equal = found.equal == found.texts
    detail = f"{found} equal to mlx_lm's, {found.before} of {found.tokens} tokens before a"
    detail += f" difference; rounding moves {found.rounding:.1e} nats"
    detail += "" if equal else f", largest gap {found.gap:.1e}"
    detail += ": more than rounding explains" if found.unexplained else ""
    status = OK if equal else FAILED if exact or found.unexplained else NOTE
    advice = TF32_ADVICE if reduced and not found.unexplained else REPORT
    return Check(name, status, detail, advice, dataclasses.asdict(found))


def sampled_check(
    name: str, model: nn.Module, drafter: Drafter, tokenizer: Any, prompts: Sequence[list[int]], reduced: bool
) -> Check:
    """Sampled texts in float32: a seed gives one text, drafted or not."""

    def write(prompt: list[int], used: Drafter | None, shape: DraftShape) -> list[int]:
        stream = stream_generate(model, tokenizer, prompt, used, max_tokens=TOKENS, chooser=SAMPLED, shape=shape)
        return [response.token for response in stream]

    found = Equality()
    for prompt in prompts:
        plain = write(prompt, None, SHAPES[0])
        for shape in SHAPES:
            found.add(plain, write(prompt, drafter, shape))
    status, advice = OK if found.equal == found.texts else FAILED, TF32_ADVICE if reduced else REPORT
    figures = {"texts": found.texts, "equal": found.equal}
    return Check(name, status, f"{found} equal to plain ones with the same seed", advice, figures)
