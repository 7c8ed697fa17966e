"""Which target a drafter was made for, in a few hundred bytes of its config.

A drafter loads with any target of its widths, and a wrong one shows only in fewer accepted
drafts. So training and conversion note what the target looks like, and loading compares.

| noted | tells apart | unmoved by |
|---|---|---|
| `model_type`, `num_layers` | architectures and sizes | any conversion |
| `tokenizer`: hash of the ids of a fixed text | tokenizers | their file format |
| `embedding`: signs of 256 entries | models trained apart: half of the signs differ | type; quantisation flips few |
| `final_norm`: 16 of its weights | most fine-tunes of one model | type; quantisation leaves norms alone |

What it cannot tell: adapters that leave the final norm alone, another system prompt or
chat template, added special tokens.
"""

from __future__ import annotations

import hashlib
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_redrafter.system.weights import tensors
from mlx_redrafter.target.model import Target

_TEXT = "The quick brown fox; don't panic.\n\n\tdef f(x, y):\n        return x**2 + 3.14159  # naïve Ωμέγα 你好 🙂 2026"
_ROWS, _COLUMNS, _NORMS = 16, 16, 16
# Of 256 signs, 2-bit weights flip about 15 %; of two models trained apart half differ, give or take 3 %.
_MOST_FLIPPED = 0.3
# float32 to bfloat16 moves a weight by up to 2^-9 of itself; the smallest change bfloat16 can show is 2^-8.
_NORM_TOLERANCE = 0.003


def fingerprint(target: Target, tokenizer: Any, name: str) -> dict[str, Any]:
    """What to note of a target in the config of its drafter.

    Args:
        tokenizer: the target's; anything with `encode`.
        name: path or Hub id, for people; of a path only the last part is kept.
    """
    model = target.model
    found: dict[str, Any] = {
        "name": name
        if name.count("/") == 1 and not name.startswith((".", "/", "~"))
        else name.rstrip("/").split("/")[-1],
        "model_type": str(getattr(model, "model_type", "")).removesuffix("_text"),
        "num_layers": len(getattr(model, "layers", ())),
        "tokenizer": _tokenizer_hash(tokenizer),
    }
    if not target.missing:
        found["embedding"] = np.packbits(_embedding_signs(target)).tobytes().hex()
    if norm := _final_norm(target):
        found["final_norm"] = norm
    return found


def difference(noted: dict[str, Any], target: Target, tokenizer: Any) -> str:
    """How a target differs from the noted one, for people; empty if it does not.

    What one of the two does not have, or has in an unknown form, is not compared.
    """
    found = fingerprint(target, tokenizer, "")
    for key, word in (("model_type", "model type"), ("num_layers", "number of layers")):
        if key in noted and noted[key] != found[key]:
            return f"{word} {noted[key]}, not {found[key]}"
    if "tokenizer" in noted and noted["tokenizer"] != found["tokenizer"]:
        return "another tokenizer"
    try:
        if "embedding" in noted and "embedding" in found:
            bits = [np.unpackbits(np.frombuffer(bytes.fromhex(f["embedding"]), np.uint8)) for f in (noted, found)]
            if np.mean(bits[0] != bits[1]) > _MOST_FLIPPED:
                return "other weights: another embedding"
        if "final_norm" in noted and "final_norm" in found:
            before, now = np.array(noted["final_norm"], float), np.array(found["final_norm"])
            if before.shape != now.shape:
                raise ValueError
            if not np.allclose(before, now, rtol=_NORM_TOLERANCE, atol=1e-6):
                return "other weights: another final norm, as after a fine-tune"
    except (ValueError, TypeError):
        return "a fingerprint of unknown form"
    return ""


def _tokenizer_hash(tokenizer: Any) -> str:
    ids = tokenizer.encode(_TEXT, add_special_tokens=False)
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]


def _embedding_signs(target: Target) -> np.ndarray:
    """(256,) booleans, from rows and columns spread over the table.

    The columns' means are taken off first: tokens share most of them, so that whole columns
    would have one sign and 256 signs say as little as 16.
    """
    rows = np.linspace(0, target.vocab_size - 1, _ROWS).astype(np.int32)
    columns = np.linspace(0, target.hidden_size - 1, _COLUMNS).astype(np.int32)
    entries = target.embed(mx.array(rows))[:, mx.array(columns)]
    found = np.array(entries.astype(mx.float32))
    return (found - found.mean(axis=0)).reshape(-1) > 0


def _final_norm(target: Target) -> list[float]:
    """16 weights spread over the norms outside the layers, four digits each; none where norms have no weights."""
    norms = [
        value
        for name, value in sorted(tensors(target.model).items(), key=lambda item: item[0])
        if name.endswith(".weight") and value.ndim == 1 and not any(part.isdigit() for part in name.split("."))
    ]
    if not norms:
        return []
    flat = mx.concatenate([value.astype(mx.float32) for value in norms])
    picked = np.array(flat[mx.array(np.linspace(0, flat.size - 1, _NORMS).astype(np.int32))])
    return [float(f"{value:.4g}") for value in picked]
