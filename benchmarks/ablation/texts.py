"""Keeps the target's own greedy texts of some prompts, with the hidden states along them.

Knows nothing of drafters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_redrafter.system.files import replace_file
from mlx_redrafter.target.model import Target
from mlx_redrafter.training.text.writing import write

AT_ONCE = 16  # texts written together


@dataclasses.dataclass
class Text:
    """One text.

    Attributes:
        tokens: (n,) int32 the prompt and what the target says.
        start: of what it says.
        contexts: (n, context_size) float32.
    """

    tokens: np.ndarray
    start: int
    contexts: mx.array


def own_texts(
    target: Target,
    prompts: list[list[int]],
    max_tokens: int,
    ends: set[int],
    layers: tuple[int, ...],
    file: pathlib.Path,
) -> list[Text]:
    """The texts, which `file` keeps. Written together, read one by one: a text ends where the two differ."""
    facts = json.dumps([prompts, max_tokens, sorted(ends), layers])
    name = hashlib.sha256(facts.encode()).hexdigest()[:16]
    if file.exists():
        arrays, found = mx.load(str(file), return_metadata=True)  # type: ignore[misc]
        if found.get("of") == name:  # type: ignore[union-attr]
            return [
                Text(np.array(arrays[f"tokens.{i}"]), int(found[f"start.{i}"]), arrays[f"contexts.{i}"])  # type: ignore
                for i in range(len(prompts))
            ]
    written: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with tqdm(total=len(prompts) * max_tokens, desc="writing", unit="tok") as bar:
        for first in range(0, len(order), AT_ONCE):
            some = order[first : first + AT_ONCE]
            asked = [prompts[i] for i in some]
            length = len(asked[-1]) + max_tokens
            said = write(target.model, asked, length, [0.0] * len(asked), ends, (0,), AT_ONCE, progress=bar.update)
            written |= dict(zip(some, said, strict=True))
    texts = []
    for i, prompt in enumerate(tqdm(prompts, desc="reading what was written", unit="text")):
        texts.append(_read(target, prompt, written[i][:max_tokens], layers))
    arrays = {f"tokens.{i}": mx.array(text.tokens) for i, text in enumerate(texts)}
    arrays |= {f"contexts.{i}": text.contexts for i, text in enumerate(texts)}
    with replace_file(file) as place:
        starts = {f"start.{i}": str(text.start) for i, text in enumerate(texts)}
        mx.save_safetensors(str(place), arrays, metadata={"of": name} | starts)
    return texts


def _read(target: Target, prompt: list[int], said: list[int], layers: tuple[int, ...]) -> Text:
    tokens = np.array([*prompt, *said], np.int32)
    caches: list[Any] = [None] * len(target.model.layers)
    hidden, logits = target.forward(mx.array(tokens[None]), caches, context_layers=layers)
    assert hidden is not None  # the command refuses targets that give none
    choices = np.array(mx.argmax(logits[0, len(prompt) - 1 : -1], axis=-1))
    other = np.flatnonzero(choices != tokens[len(prompt) :])
    end = len(tokens) if not other.size else len(prompt) + int(other[0])
    contexts = hidden[0, :end].astype(mx.float32)
    mx.eval(contexts)
    return Text(tokens[:end], len(prompt), contexts)
