"""Whether decoding holds what it has to, the target's and drafter's weights and one cache, and no more.

Knows nothing of what is written.
"""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_redrafter.doctor.checks import FAILED, OK, Check
from mlx_redrafter.doctor.texts import PROMPTS, SHAPES, TOKENS
from mlx_redrafter.drafting.kinds import Drafter
from mlx_redrafter.system.weights import weights
from mlx_redrafter.target.cache.kv_cache import leaves
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.text.generate import stream_generate

SPARE = 0.05  # of what was predicted
LEAST_SPARE = 8e6  # bytes; activations of a few rows, which small weights do not hide


def active_memory() -> int:
    """Bytes that MLX holds, once what nobody needs is gone."""
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()


def memory_check(model: nn.Module, drafter: Drafter, tokenizer: Any, before: int) -> Check:
    """Writes a text, and compares the peak behind its first token with what was predicted.

    Args:
        before: bytes that MLX held before the pair was loaded.
    """
    verifier_of(model)  # its self-check holds memory of its own
    prompt = tokenizer.encode(PROMPTS[0])
    predicted = {"target": weights(model)[1], "drafter": weights(drafter)[1]}
    predicted["one cache"] = cache_bytes(model, len(prompt) + TOKENS)
    active_memory()
    for i, _ in enumerate(stream_generate(model, tokenizer, prompt, drafter, max_tokens=TOKENS, shape=SHAPES[-1])):
        if i == 0:
            mx.reset_peak_memory()
    return verdict(predicted, mx.get_peak_memory() - before)


def cache_bytes(model: nn.Module, tokens: int) -> int:
    """Bytes of mlx-lm's own cache of so many tokens; nothing is computed."""
    caches = make_prompt_cache(model)
    model(mx.zeros((1, tokens), mx.int32), cache=caches)
    return sum(int(leaf.nbytes) for leaf in leaves(caches))


def verdict(predicted: dict[str, int], peak: int) -> Check:
    """Whether a peak is what was predicted, both in bytes."""
    total = sum(predicted.values())
    spare = max(SPARE * total, LEAST_SPARE)
    parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in predicted.items())
    detail = f"peak {peak / 1e6:.1f} MB, predicted {total / 1e6:.1f} ({parts}) and {spare / 1e6:.1f} to spare"
    figures = {"peak_bytes": peak, "predicted_bytes": predicted, "spare_bytes": int(spare)}
    return Check("memory", FAILED if peak > total + spare else OK, detail, figures=figures)
