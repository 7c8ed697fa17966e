"""What an answer says of how it was made: under `usage` and `timings`. Knows nothing of HTTP."""

from __future__ import annotations

from typing import Any

from mlx_redrafter.text.responses import GenerationResponse

OURS = ("draft_tokens", "accepted_tokens", "forced_tokens", "mean_acceptance_length")


def usage(last: Any) -> dict[str, Any]:
    """The fields of `usage` that are not OpenAI's.

    Args:
        last: the last response of a text; of mlx_lm's own loop nothing is said.
    """
    return {name: getattr(last, name) for name in OURS} if isinstance(last, GenerationResponse) else {}


def timings(last: Any) -> dict[str, Any]:
    """Speeds and drafts; names that llama.cpp's server has are its names."""
    found: dict[str, Any] = {
        "prompt_n": last.prompt_tokens,
        "prompt_per_second": last.prompt_tps,
        "predicted_n": last.generation_tokens,
        "predicted_per_second": last.generation_tps,
    }
    if isinstance(last, GenerationResponse):
        found |= {
            "draft_n": last.draft_tokens,
            "draft_n_accepted": last.accepted_tokens,
            "forced_n": last.forced_tokens,
            "method": last.method,
            "shape": None if last.shape is None else str(last.shape),
            "plain_share": last.plain_share,
            "lookup_share": last.lookup_share,
            "forced_share": last.forced_share,
        }
        if last.reason:
            found["reason"] = last.reason
    return found
