"""Turns tokens into pieces of text with figures; knows nothing of models."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Generator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.decoding.step import Produced
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, Forced, LookedUp, Plan
from mlx_redrafter.text.stop_strings import StopStrings


@dataclasses.dataclass
class GenerationResponse:
    """A piece of text and where generation stands; mlx-lm's fields first, in its order.

    Attributes:
        text: the next segment; may be empty.
        token: the token it ends with.
        logprobs: (vocab_size,) log-probabilities that the token was chosen from; lazy, for the
            thread that took the response; empty where they were not asked for.
        from_draft: whether the token had been drafted.
        prompt_tokens, prompt_tps: length of the prompt, and tokens per second reading it.
        generation_tokens, generation_tps: tokens so far, and per second.
        peak_memory: in GB.
        finish_reason: "stop", "length" or None while it goes on.
        steps: verifications so far.
        draft_tokens, accepted_tokens: drafts that were verified, and those of them that are in the text.
        forced_tokens: tokens of the text that a constraint forced, whoever had drafted them, and that were verified
            beside others: neither drafts nor accepted.
        mean_acceptance_length: tokens per step, the target's own one included; 1.0 without drafts.
        acceptance_by_position: share of steps that got at least d draft tokens accepted, d = 1, 2, ...
        method: "redrafter", "medusa", "eagle3", "mtp", "draft model", "lookup" or "grammar" (alone), or "plain".
        reason: why a given drafter was not used, or with limits, for people; empty otherwise.
        shape: how much most steps of a drafter drafted; None where there were none.
        plain_share, lookup_share, forced_share: shares of steps that drafted nothing, only what lookup found, and
            only what a constraint forces.
    """

    text: str
    token: int
    logprobs: mx.array
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None
    steps: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    forced_tokens: int = 0
    mean_acceptance_length: float = 1.0
    acceptance_by_position: list[float] = dataclasses.field(default_factory=list)
    method: str = "plain"
    reason: str = ""
    shape: DraftShape | None = None
    plain_share: float = 0.0
    lookup_share: float = 0.0
    forced_share: float = 0.0


@dataclasses.dataclass
class Statistics:
    """What the tokens so far say of the drafts.

    Attributes:
        steps: verifications that the text so far took.
        drafts: rows that had been drafted and could be right or wrong.
        accepted: accepted[d - 1] is the number of steps that got at least d of them in.
        forced: tokens that a grammar forced, and that were verified with others.
        plans: steps by what they drafted; those that looked up in vain drafted nothing.
    """

    steps: int = 0
    drafts: int = 0
    forced: int = 0
    accepted: list[int] = dataclasses.field(default_factory=list)
    plans: Counter[Plan] = dataclasses.field(default_factory=Counter)
    _in_step: int = 0  # tokens of the current step so far
    _right: int = 0  # of them, drafts

    def count(self, produced: Produced) -> None:
        """Takes one token of a step; the one that follows the prompt came without a step."""
        if produced.from_prompt:
            return
        if self._in_step == 0:
            self.steps += 1
            self.drafts += produced.drafts
            found = produced.drafts or produced.forced or not isinstance(produced.plan, LookedUp)
            self.plans[produced.plan if found else PLAIN] += 1
            self._right = 0
        elif self._in_step - 1 in produced.forced:
            self.forced += 1
        else:
            if self._right == len(self.accepted):
                self.accepted.append(0)
            self.accepted[self._right] += 1
            self._right += 1
        self._in_step = 0 if produced.last else self._in_step + 1

    def figures(self) -> dict[str, Any]:
        """The fields of a response that they fill; shares are of the steps.

        Tokens per step count the target's own one, so they are 1.0 without drafts; the shape is
        the one that most steps of a drafter had, None where there were none.
        """
        steps = max(1, self.steps)
        shapes = Counter(plan.shape for plan in self.plans.elements() if isinstance(plan, Drafted))
        return {
            "steps": self.steps,
            "draft_tokens": self.drafts,
            "accepted_tokens": sum(self.accepted),
            "forced_tokens": self.forced,
            "mean_acceptance_length": 1 + (sum(self.accepted) + self.forced) / steps,
            "acceptance_by_position": [count / steps for count in self.accepted],
            "shape": next((shape for shape, _ in shapes.most_common(1)), None),
            "plain_share": self.plans[PLAIN] / steps,
            "lookup_share": sum(n for plan, n in self.plans.items() if isinstance(plan, LookedUp)) / steps,
            "forced_share": sum(n for plan, n in self.plans.items() if isinstance(plan, Forced)) / steps,
        }


def summary(response: GenerationResponse) -> str:
    """A finished response's figures as mlx-lm prints them, and how the drafts fared."""
    lines = [
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec",
        f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.3f} tokens-per-sec",
        f"Peak memory: {response.peak_memory:.3f} GB",
    ]
    if response.method != "plain":
        rates = " ".join(f"{rate:.0%}" for rate in response.acceptance_by_position) or "no draft"
        lines.append(
            f"Mean acceptance length: {response.mean_acceptance_length:.2f} over {response.steps} steps"
            f" (by position: {rates})"
        )
        if response.forced_tokens:
            lines.append(f"Forced by the grammar: {response.forced_tokens} tokens, which count as no drafts")
        lines.append(f"Drafted: {drafted(response)}")
        if response.reason:
            lines.append(f"Drafting is limited: {response.reason}")
    elif response.reason:
        lines.append(f"Decoded without drafts: {response.reason}")
    return "\n".join(lines)


def drafted(response: GenerationResponse) -> str:
    """What was drafted, in a few words."""
    if response.plain_share == 1 or not response.steps:
        return "nothing, it does not pay here" if response.steps else "nothing"
    by_drafter = 1 - response.plain_share - response.lookup_share - response.forced_share
    shares = {
        f"by the drafter (mostly {response.shape})": 0.0 if response.shape is None else by_drafter,
        "by lookup": response.lookup_share,
        "by the grammar": response.forced_share,
        "nothing": response.plain_share,
    }
    parts = [f"{words} in {share:.0%} of the steps" for words, share in shares.items() if share]
    return parts[0].removesuffix(" in 100% of the steps") if len(parts) == 1 else ", ".join(parts)


def responses(
    source: Generator[Produced],
    tokenizer: TokenizerWrapper,
    prompt_tokens: int,
    max_tokens: int,
    stop: Sequence[str],
    method: str,
    reason: str,
    began: float | None = None,
) -> Generator[GenerationResponse]:
    """Turns tokens into text and counts.

    Args:
        source: one token at a time.
        stop: texts that end the generation; neither they nor what follows is given out.
        method, reason: as in `GenerationResponse`.
        began: when reading the prompt began, by `time.perf_counter`; None for now.
    """
    detokenizer, statistics, stops = tokenizer.detokenizer, Statistics(), StopStrings(stop) if stop else None
    tic = time.perf_counter() if began is None else began
    prompt_tps, made = 0.0, 0
    try:
        for produced in source:
            [token] = produced.tokens
            made += 1
            if made == 1:
                prompt_tps = prompt_tokens / max(time.perf_counter() - tic, 1e-9)
                tic = time.perf_counter()
            statistics.count(produced)
            ended = "stop" if token in tokenizer.eos_token_ids else "length" if made == max_tokens else None
            if ended != "stop":
                detokenizer.add_token(token)
            if ended:
                detokenizer.finalize()
            text = detokenizer.last_segment
            if stops is not None:
                text, stopped = stops.take(text, last=ended is not None)
                ended = "stop" if stopped else ended
            row = produced.logits[0]
            yield GenerationResponse(
                text=text,
                token=token,
                logprobs=row - mx.logsumexp(row) if row.size else row,
                from_draft=produced.drafted[0],
                prompt_tokens=prompt_tokens,
                prompt_tps=prompt_tps,
                generation_tokens=made,
                generation_tps=made / max(time.perf_counter() - tic, 1e-9),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=ended,
                method=method,
                reason=reason,
                **statistics.figures(),
            )
            if ended:
                return
    finally:
        source.close()
