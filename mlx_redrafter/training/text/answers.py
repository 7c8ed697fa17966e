"""Makes rows in which the target answers: prompts from a file, or questions that it asks itself.

To ask itself, a chat model reads its chat template up to the user's first word and writes
the user's turn (the idea of Magpie, arXiv 2406.08464). Then it answers.
Knows nothing of files that hold answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mlx_redrafter.errors import UserError
from mlx_redrafter.training.text.data_plan import SELF, SESSIONS
from mlx_redrafter.training.text.formats import Question
from mlx_redrafter.training.text.rendering import Renderer, digest
from mlx_redrafter.training.text.shards import Marked, Progress, Recipe, Shard, shard_of
from mlx_redrafter.training.text.writing import Writer, write

QUESTION_TOKENS = 128  # the most that a question of the target's own has
LEAST_ANSWER = 8  # tokens that a row must have room for
LEAST_ASKED = 16  # questions to ask for at a time, for some are empty or too long
TRIES = 4  # times to ask for more


def answers_recipe(writer: Writer, questions: list[Question]) -> Recipe:
    """Rows that answer prompts: each once where the target regenerates, else as often as rows are wanted.

    A conversation of several turns gives a row for each, with the target's own earlier
    answers before it, as long as they fit into a row. Held-out rows have prompts of their own.

    Raises:
        UserError: prompts that need a chat template which is not there, or that are all too long.
    """
    renderer, plan = writer.renderer, writer.plan
    source = f"--data {SESSIONS}" if plan.prompts is None else f"--prompts {plan.prompts}"
    first = [len(_asked(renderer, question, [])) for question in questions]
    fitting = [q for q, n in zip(questions, first, strict=True) if n + LEAST_ANSWER <= plan.length]
    if not fitting:
        raise UserError(
            f"{source}: the shortest prompt has {min(first)} tokens,"
            f" expected at most {plan.length - LEAST_ANSWER} (--row-length less {LEAST_ANSWER})"
        )
    order = np.random.default_rng(plan.seed).permutation(len(fitting))
    turns = np.array([1 if fitting[i].answered else len(fitting[i].turns) for i in order])
    kept = int(np.searchsorted(np.cumsum(turns[::-1]), plan.held_out) + 1) if plan.held_out else 0
    if kept >= len(order):
        raise UserError(
            f"{source}: found {len(order)} prompts that fit into a row, expected more:"
            f" {plan.held_out} rows are held out with prompts of their own"
        )
    training, held_out = order[: len(order) - kept], order[len(order) - kept :]
    turns = turns[: len(training)]
    free = plan.rows is None and plan.data != (SELF,)  # every prompt once, whatever rows that gives
    passes = 1 if free else -(-plan.training_rows // int(turns.sum()))
    picks = np.tile(training, passes)
    # A pass after the first asks the same prompt at the next temperature.
    temperatures = [plan.temps[(n + n // len(training)) % len(plan.temps)] for n in range(len(picks))]
    parts = np.searchsorted(
        np.cumsum(np.tile(turns, passes)) - 1, np.arange(0, passes * turns.sum(), plan.rows_per_shard)
    )
    bounds = [*dict.fromkeys(parts.tolist()), len(picks)]

    def make(shard: int, progress: Progress) -> Shard:
        if shard == len(bounds) - 1:
            some, at, most = [fitting[i] for i in held_out], plan.temperatures(range(len(held_out))), plan.held_out
        else:
            here = range(bounds[shard], bounds[shard + 1])
            some, at, most = [fitting[picks[n]] for n in here], temperatures[here.start : here.stop], None
            # What is known already would come again; another pass gets another answer.
            some = [q if n < len(training) else dataclasses.replace(q, answered=None) for n, q in zip(here, some)]
        rows = answer(writer, some, at, (plan.seed, shard), progress)
        return shard_of(rows[:most], plan.length, {"prompts": len(some)})

    known = [[dataclasses.asdict(q.answered)] if q.answered else [] for q in questions]
    content = digest([[q.system, q.turns, *answered] for q, answered in zip(questions, known, strict=True)])
    files = [{"path": plan.prompts or SESSIONS, "sha256": content, "prompts": len(questions)}]
    limit = None if free else plan.training_rows
    return writer.recipe(make, len(bounds) - 1, limit, files=files)


def invented_recipe(writer: Writer) -> Recipe:
    """Rows in which the target answers what it asked itself."""
    renderer, plan = writer.renderer, writer.plan
    opening = renderer.opening()
    around = len(_asked(renderer, Question("the target", ["?"]), []))
    room = plan.length - around
    if room < 2 * LEAST_ANSWER:
        raise UserError(
            f"--row-length is {plan.length}, expected {around + 2 * LEAST_ANSWER} or more:"
            f" the chat template alone takes {around} tokens"
        )
    longest = len(opening) + min(QUESTION_TOKENS, room // 2)

    def make(shard: int, progress: Progress) -> Shard:
        numbers = plan.numbers(shard)
        questions: list[Question] = []
        for attempt in range(TRIES):
            missing = len(numbers) - len(questions)
            if missing <= 0:
                break
            asks = max(missing, LEAST_ASKED)
            seed, ends = (plan.seed, shard, attempt), renderer.turn_ends()
            written = write(
                writer.model, [opening] * asks, longest, [1.0] * asks, ends, seed, plan.batch_size, progress=progress
            )
            asked = [Question("the target", [turn]) for turn in map(renderer.users_turn, written) if turn]
            questions += [q for q in asked if len(_asked(renderer, q, [])) + LEAST_ANSWER <= plan.length]
        if not questions:
            raise UserError("the target writes no questions after its chat template; expected --prompts FILE")
        # Where it asked nothing a few times over, another question gets a second answer.
        chosen = [questions[i % len(questions)] for i in range(len(numbers))]
        at, seed = plan.temperatures(numbers), (plan.seed, shard, TRIES)
        rows = answer(writer, chosen, at, seed, progress)
        return shard_of(rows, plan.length, {"questions": min(len(questions), len(numbers))})

    return writer.recipe(make)


def answer(
    writer: Writer,
    questions: Sequence[Question],
    temperatures: Sequence[float],
    seed: Sequence[int],
    progress: Progress,
) -> list[Marked]:
    """A row for every turn of every question that fits: the prompt, and the answer, which alone is to be learned.

    What is answered already is taken as it is, as far as it fits into a row. There is a temperature for each
    question; the noise depends on the numbers of `seed`.
    """
    rows = [_known(writer, question) for question in questions]
    said: list[list[str]] = [[] for _ in questions]
    going = [i for i, found in enumerate(rows) if not found]
    for turn in range(max((len(questions[i].turns) for i in going), default=0)):
        asked = {i: _asked(writer.renderer, questions[i], said[i]) for i in going if turn < len(questions[i].turns)}
        going = [i for i, ids in asked.items() if len(ids) + LEAST_ANSWER <= writer.plan.length]
        at = [temperatures[i] for i in going]
        written = writer.write([asked[i] for i in going], at, (*seed, turn), progress)
        for i, tokens in zip(going, written, strict=True):
            row = [*asked[i], *tokens]
            rows[i].append((row, np.arange(len(row)) >= len(asked[i])))
            said[i].append(writer.renderer.decode(tokens))
    return [row for found in rows for row in found]


def _known(writer: Writer, question: Question) -> list[Marked]:
    """Rows of a question that is answered already; none where nothing to learn fits."""
    if (answered := question.answered) is None:
        return []
    renderer, length = writer.renderer, writer.plan.length
    whole = [renderer.text(answered)] if answered.text else renderer.conversation(answered.messages, answered.where)
    return [(ids[:length], marks[:length]) for ids, marks in whole if marks[1:length].any()]


def _asked(renderer: Renderer, question: Question, said: list[str]) -> list[int]:
    """The prompt of the turn after `said`: by the chat template, or as text where there is none and none is needed."""
    if question.plain and not renderer.has_template:
        return renderer.encode(question.turns[0])
    messages = [{"role": "system", "content": question.system}] if question.system else []
    for user, assistant in zip(question.turns, said, strict=False):
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return renderer.question([*messages, {"role": "user", "content": question.turns[len(said)]}], question.where)
