"""Checks one of mlx-lm's model modules: what it can be used for, and whether its text stays the same.

Knows nothing of the table that is made of all. A small random float32 instance (see `small_models`) writes 64 tokens
greedily: with mlx_lm, with a drafter that knows nothing, with one that knows the continuation, and with mlx_lm again.
Windows have 16 tokens, so that all of them wrap.
"""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import ArraysCache, RotatingKVCache, make_prompt_cache
from mlx_lm.utils import load_tokenizer
from mlx_redrafter.benchmarks.architectures.small_models import PerfectDrafter, build, random_drafter

from mlx_redrafter.drafting.redrafter import RecurrentDrafter
from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.target.cache.kv_cache import leaves
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import NONE
from mlx_redrafter.text.equality import first_difference
from mlx_redrafter.text.generate import stream_generate
from mlx_redrafter.text.loading import EMBEDDED
from mlx_redrafter.training.drafters.recipes import quarters

TOKENS = 64
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38]
SHAPE = DraftShape(beam_width=2, beam_length=5, num_draft_tokens=6)


@dataclasses.dataclass
class Outcome:
    """One row of the table.

    Attributes:
        module: of mlx_lm.models.
        capability: "tree", "chain" or "none".
        equal: whether all texts were mlx_lm's, token for token; None if mlx_lm itself
            writes none here.
        reason: why the capability is not "tree", or the texts differ.
        layers: "attention", "windows", "states", or several of them.
        perfect: tokens per step with the drafter that knows the continuation.
        taps: the same with one that finds its place by hidden states between layers; None where they cannot be read.
    """

    module: str
    capability: str
    equal: bool | None
    reason: str = ""
    layers: str = ""
    perfect: float | None = None
    taps: float | None = None


def check(name: str) -> Outcome:
    """Makes a small instance of a module and compares its texts."""
    try:
        model = build(name)
        before = plain(model)
    except (Exception, SystemExit) as error:
        words = " ".join(str(error).split()) or "no text"
        return Outcome(name, NONE, None, f"mlx_lm itself does not decode with it here: {type(error).__name__} {words}")
    verifier = verifier_of(model)
    outcome = Outcome(name, verifier.capability, False, verifier.reason, kinds_of(model))
    texts = {"without a drafter": drafted(model, None)[0]}
    if verifier.capability != NONE:
        texts["with a random drafter"], _ = drafted(model, random_drafter(verifier.target))
        perfect = PerfectDrafter(verifier.target, PROMPT, before)
        texts["with a perfect drafter"], outcome.perfect = drafted(model, perfect)
        if layers := between(verifier.target):
            perfect = PerfectDrafter(verifier.target, PROMPT, before, layers)
            texts["with contexts between layers"], outcome.taps = drafted(model, perfect)
    texts["by mlx_lm afterwards"] = plain(model)
    wrong = [how for how, text in texts.items() if first_difference(before, text) is not None]
    outcome.equal = not wrong
    if wrong:
        outcome.reason = "; ".join(filter(None, [outcome.reason, f"another text {', '.join(wrong)}"]))
    return outcome


def between(target: Target) -> tuple[int, ...]:
    """A quarter, a half and three quarters of the layers; none where hidden states between them cannot be read."""
    return tuple(quarters(target.num_layers)[:-1])


def plain(model: nn.Module) -> list[int]:
    """mlx_lm's own text."""
    return [int(token) for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=TOKENS)]


def drafted(model: nn.Module, drafter: RecurrentDrafter | None) -> tuple[list[int], float]:
    """Our text, and its tokens per step."""
    # Ids are all that counts: any tokenizer will do, as long as no token ends the text.
    tokenizer = load_tokenizer(EMBEDDED / "target")
    tokenizer.eos_token_ids = []
    responses = stream_generate(model, tokenizer, PROMPT, drafter, max_tokens=TOKENS, shape=SHAPE)
    tokens, last = [], None
    for last in responses:
        tokens.append(last.token)
    return tokens[:TOKENS], getattr(last, "mean_acceptance_length", 1.0)


def kinds_of(model: nn.Module) -> str:
    """What kinds of layers a model has, by their caches."""
    found = leaves(make_prompt_cache(model))
    kinds = {
        "windows": any(isinstance(cache, RotatingKVCache) for cache in found),
        "states": any(isinstance(cache, ArraysCache) for cache in found),
        "attention": any(not isinstance(cache, (RotatingKVCache, ArraysCache)) for cache in found),
    }
    return ", ".join(sorted(kind for kind, there in kinds.items() if there))
