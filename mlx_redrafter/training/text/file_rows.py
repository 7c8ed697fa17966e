"""Makes rows of files: one for each conversation; texts are joined and cut.

Knows nothing of text that the target writes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mlx_redrafter.errors import UserError
from mlx_redrafter.training.text.data_plan import DataPlan
from mlx_redrafter.training.text.documents import Documents
from mlx_redrafter.training.text.formats import Document
from mlx_redrafter.training.text.rendering import Renderer
from mlx_redrafter.training.text.shards import Marked, Progress, Recipe, Shard, shard_of

BYTES_PER_TOKEN = 4  # a guess, for how many documents make a shard


def files_recipe(renderer: Renderer, plan: DataPlan) -> Recipe:
    """Rows of the documents of files, in an order shuffled by the seed.

    Training shards take whole documents, as many as make about the wanted rows. Held-out
    rows are made of the last documents in that order, which no training row is from.

    Raises:
        UserError: as `Documents`, or too few documents for the held-out rows.
    """
    documents = Documents(plan.data, "--data")
    if documents.roles.any():
        _conversation(renderer, documents[int(np.argmax(documents.roles))])  # shows early what the template cannot do
    order = np.random.default_rng(plan.seed).permutation(len(documents))
    kept, held_out = _hold_out(renderer, documents, order, plan)
    training = order[: len(order) - kept]
    likely = np.maximum(documents.sizes[training] / (BYTES_PER_TOKEN * plan.length), documents.roles[training])
    shard_of_document = (np.cumsum(likely) - likely) // plan.rows_per_shard
    bounds = [0, *(np.flatnonzero(np.diff(shard_of_document)) + 1).tolist(), len(training)]

    def make(shard: int, progress: Progress) -> Shard:
        if shard == len(bounds) - 1:
            return held_out
        some = training[bounds[shard] : bounds[shard + 1]]
        rows, facts = cut_rows(renderer, (documents[int(i)] for i in some), plan.length)
        progress(sum(len(ids) for ids, _ in rows))
        return shard_of(rows, plan.length, facts)

    settings = plan.settings(tokenizer=renderer.fingerprint(), files=documents.files)
    limit = None if plan.rows is None else plan.training_rows
    return Recipe(settings, plan.length, len(bounds) - 1, make, plan.held_out > 0, limit)


def cut_rows(renderer: Renderer, documents: Iterable[Document], length: int) -> tuple[list[Marked], dict[str, int]]:
    """Documents as rows of at most `length` tokens.

    A conversation has a row of its own, and what does not fit is cut off: an answer without
    its question would be another text than the target ever sees. Texts are joined, each
    with the token that ends it, and cut into full rows; the last is shorter.

    Returns:
        the rows, and counts of documents, of tokens cut off, and of documents left out because
        nothing to be learned was left.
    """
    rows: list[Marked] = []
    stream: list[int] = []
    marks: list[np.ndarray] = []
    facts = {"documents": 0, "left_out": 0, "tokens_cut": 0}
    for document in documents:
        facts["documents"] += 1
        if not document.has_roles:
            ids, counts = renderer.text(document)
            stream += ids
            marks.append(counts)
            continue
        before = len(rows)
        for ids, counts in _conversation(renderer, document):
            facts["tokens_cut"] += max(0, len(ids) - length)
            if counts[1:length].any():
                rows.append((ids[:length], counts[:length]))
        facts["left_out"] += len(rows) == before
    joined = np.concatenate([np.zeros(0, bool), *marks])
    pieces = [(stream[at : at + length], joined[at : at + length]) for at in range(0, len(stream), length)]
    return rows + [piece for piece in pieces if piece[1][1:].any()], facts


def _conversation(renderer: Renderer, document: Document) -> list[Marked]:
    if document.messages:
        return renderer.conversation(document.messages, document.where)
    if not renderer.has_template:
        return [renderer.text(document)]
    asked = {"role": "user", "content": document.prompt}
    return renderer.conversation([asked, {"role": "assistant", "content": document.text}], document.where)


def _hold_out(renderer: Renderer, documents: Documents, order: np.ndarray, plan: DataPlan) -> tuple[int, Shard]:
    """How many documents at the end of the order make the held-out rows, and these."""
    kept, tokens, rows, texts = 0, 0, list[Marked](), list[Document]()
    while len(rows) + tokens // plan.length < plan.held_out:
        if kept == len(order) - 1:
            raise UserError(
                f"--data {' '.join(plan.data)}: {len(order)} documents are too few: {plan.held_out} rows are held out"
                " with documents of their own (a text of more than 64 kB counts as several); try a lower --held-out"
            )
        kept += 1
        document = documents[int(order[len(order) - kept])]
        if document.has_roles:
            rows += cut_rows(renderer, [document], plan.length)[0]
        else:
            texts.append(document)
            tokens += len(renderer.text(document)[0])
    rows += cut_rows(renderer, texts, plan.length)[0]
    return kept, shard_of(rows[: plan.held_out], plan.length, {"documents": kept})
