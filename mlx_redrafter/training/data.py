"""Text for training a drafter: the target's own, continued from short prefixes.

A drafter has to guess what the target will say, so what the target says is the best text
to learn from; no corpus of the target's is needed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

from ..errors import UserError
from ..target import Target

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")


def read_texts(paths: Sequence[str]) -> list[str]:
    """The texts of files, and of all text files below directories.

    Raises:
        UserError: a path that does not exist, or no text at all.
    """
    texts = []
    for name in paths:
        path = pathlib.Path(name)
        if not path.exists():
            raise UserError(f"--prefixes {name}: no such file or directory")
        files = sorted(p for s in TEXT_SUFFIXES for p in path.rglob(f"*{s}")) if path.is_dir() else [path]
        for file in files:
            try:
                texts.append(file.read_text("utf-8"))
            except (UnicodeDecodeError, OSError) as error:
                if not path.is_dir():
                    raise UserError(f"--prefixes {file}: not readable as text ({error})") from error
    if not any(text.strip() for text in texts):
        raise UserError(f"--prefixes {' '.join(paths)}: no text found (looked for {', '.join(TEXT_SUFFIXES)})")
    return texts


def cut_prefixes(token_lists: Sequence[Sequence[int]], count: int, length: int, seed: int) -> np.ndarray:
    """(count, length) int32 token ids cut at random places, longer texts more often.

    Raises:
        UserError: no text has `length` tokens.
    """
    rng = np.random.default_rng(seed)
    lists = [np.asarray(tokens, np.int32) for tokens in token_lists if len(tokens) >= length]
    if not lists:
        raise UserError(f"--prefixes: no text has as many as {length} tokens (--prefix-length)")
    starts = np.array([len(tokens) - length + 1 for tokens in lists])
    picks = rng.choice(len(lists), size=count, p=starts / starts.sum())
    places = (rng.random(count) * starts[picks]).astype(np.int64)
    return np.stack([lists[i][at : at + length] for i, at in zip(picks, places, strict=True)])


def self_written(
    target: Target,
    prefixes: np.ndarray,
    length: int,
    temperatures: Sequence[float],
    seed: int,
    batch_size: int = 64,
    warm_up: int = 0,
) -> np.ndarray:
    """Lets the target continue prefixes, many at a time.

    Args:
        target: the model.
        prefixes: (R, P) int32.
        length: tokens per row in all, more than P.
        temperatures: row r is sampled at temperatures[r % len(temperatures)]; 0 is greedy.
        seed: of the noise.
        batch_size: rows at a time.
        warm_up: the first so many tokens are sampled at temperature 1 in every row, for
            variety where the prefixes have none.

    Returns:
        (R, length) int32, the prefixes included.
    """
    rows, start = prefixes.shape
    written = np.zeros((rows, length), np.int32)
    key = mx.random.key(seed)
    with tqdm(total=rows * (length - start), desc="writing", unit="tok", unit_scale=True) as bar:
        for first in range(0, rows, batch_size):
            batch = mx.array(prefixes[first : first + batch_size])
            at = np.arange(first, first + batch.shape[0]) % len(temperatures)
            temps = mx.array(np.asarray(temperatures, np.float32)[at])[:, None]
            cache = make_prompt_cache(target.model)
            token, columns = batch, []
            for i in range(length - start):
                _, logits = target.forward(token, cache)
                logits = logits[:, -1].astype(mx.float32)
                key, use = mx.random.split(key)
                noise = mx.random.gumbel(logits.shape, key=use)
                heat = mx.maximum(temps, 1.0) if i < warm_up else temps
                token = mx.argmax(logits + heat * noise, axis=-1, keepdims=True).astype(mx.int32)
                mx.async_eval(token)
                columns.append(token)
                bar.update(batch.shape[0])
            block = mx.concatenate([batch, *columns], axis=1)
            written[first : first + batch.shape[0]] = np.array(block)
            mx.clear_cache()
    return written
