"""Makes rows that a base model writes: from the beginning-of-text token, or from short beginnings of texts.

Knows nothing of chat templates.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlx_redrafter.errors import UserError
from mlx_redrafter.training.text.documents import Documents
from mlx_redrafter.training.text.rendering import Renderer
from mlx_redrafter.training.text.shards import Progress, Recipe, Shard, shard_of
from mlx_redrafter.training.text.writing import Writer

WARM_UP = 16  # tokens at temperature 1 after a beginning that is the same in every row
TRIES = 100  # places to try for a beginning that is long enough
BYTES_PER_TOKEN = 12  # read so much for each token of a beginning; fewer tokens are a place to try again
HELD_OUT_SHARE = 0.05  # of the documents, for the held-out rows


@dataclasses.dataclass
class Texts:
    """Documents to cut beginnings from: their files, the size of each text, and what gives a text by its number."""

    files: list[dict[str, Any]]
    sizes: np.ndarray
    read: Callable[[int], str]

    @classmethod
    def of_files(cls, names: Sequence[str]) -> Texts:
        """Raises UserError as `Documents` does, and where a document is a conversation."""
        documents = Documents(names, "--prefixes")
        if documents.roles.any():
            where = documents[int(np.argmax(documents.roles))].where
            raise UserError(f"--prefixes: {where} is a conversation, expected text (use --prompts for what to ask)")
        return cls(documents.files, documents.sizes, lambda number: documents[number].text)

    @classmethod
    def of_strings(cls, name: str, texts: Sequence[str]) -> Texts:
        digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
        sizes = np.array([len(text) for text in texts], np.int64)
        return cls([{"path": name, "sha256": digest, "bytes": int(sizes.sum())}], sizes, lambda number: texts[number])


def bare_recipe(writer: Writer) -> Recipe:
    """Rows written from nothing but the token that texts begin with."""
    opening = writer.renderer.first_token()

    def make(shard: int, progress: Progress) -> Shard:
        return _continued(writer, [[opening]] * len(writer.plan.numbers(shard)), shard, progress, WARM_UP)

    return writer.recipe(make)


def prefixes_recipe(writer: Writer, texts: Texts) -> Recipe:
    """Rows continued from beginnings cut at random places, those of held-out rows from documents of their own."""
    plan = writer.plan
    if plan.prefix_length >= plan.length:
        raise UserError(f"--prefix-length is {plan.prefix_length}, expected less than --row-length, {plan.length}")
    order = np.random.default_rng(plan.seed).permutation(len(texts.sizes))
    kept = max(1, round(HELD_OUT_SHARE * len(order))) if plan.held_out else 0
    if kept == len(order):
        raise UserError(
            f"--prefixes: found 1 text, expected 2 or more, for {plan.held_out} rows are held out"
            " with documents of their own (a text of more than 64 kB counts as several)"
        )

    def make(shard: int, progress: Progress) -> Shard:
        rng = np.random.default_rng((plan.seed, shard))
        pool = order[len(order) - kept :] if shard == plan.shards else order[: len(order) - kept]
        prompts = [_cut(writer.renderer, texts, pool, rng, plan.prefix_length) for _ in plan.numbers(shard)]
        return _continued(writer, prompts, shard, progress)

    more: dict[str, Any] = {"prefix-length": plan.prefix_length, "files": texts.files}
    return writer.recipe(make, **more)


def _continued(writer: Writer, prompts: list[list[int]], shard: int, progress: Progress, warm_up: int = 0) -> Shard:
    plan = writer.plan
    temperatures = plan.temperatures(plan.numbers(shard))
    written = writer.write(prompts, temperatures, (plan.seed, shard), progress, warm_up)
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, written, strict=True)]
    return shard_of([(row, np.ones(len(row), bool)) for row in rows], plan.length)


def _cut(renderer: Renderer, texts: Texts, pool: np.ndarray, rng: np.random.Generator, length: int) -> list[int]:
    """The first tokens of a text from a random place on, the beginning of a line where one is near."""
    sizes = texts.sizes[pool]
    for _ in range(TRIES):
        text = texts.read(int(rng.choice(pool, p=sizes / sizes.sum())))
        at = int(rng.integers(len(text))) if text else 0
        line = text.rfind("\n", 0, at) + 1
        snippet = text[line if at - line < 256 else at :][: BYTES_PER_TOKEN * length]
        tokens = renderer.encode(snippet)[:length]
        if len(tokens) == length and snippet.strip():
            return tokens
    raise UserError(f"--prefixes: no text has as many as {length} tokens (--prefix-length)")
