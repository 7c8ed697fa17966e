"""Chooses the source of text that the flags name, and writes its rows once into a folder.

A drafter guesses the target's words, so text that the target writes is the best to learn from.
The other sources are files, and the target's answers to prompts: of a file, or of recorded sessions.
Knows nothing of drafters.
"""

from __future__ import annotations

import pathlib

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_redrafter.embedded.corpus import stdlib_files
from mlx_redrafter.errors import UserError
from mlx_redrafter.target.model import Target
from mlx_redrafter.training.text.answers import answers_recipe, invented_recipe
from mlx_redrafter.training.text.data_plan import REGENERATED, SELF, SESSIONS, DataPlan
from mlx_redrafter.training.text.file_rows import files_recipe
from mlx_redrafter.training.text.formats import read_questions
from mlx_redrafter.training.text.prefixes import Texts, bare_recipe, prefixes_recipe
from mlx_redrafter.training.text.rendering import Renderer
from mlx_redrafter.training.text.sessions import sessions_recipe
from mlx_redrafter.training.text.shards import Recipe, Rows, write_rows
from mlx_redrafter.training.text.writing import Writer


def prepare(
    folder: str | pathlib.Path, target: Target, tokenizer: TokenizerWrapper, plan: DataPlan, embedded: bool = False
) -> Rows:
    """Writes the rows that a plan asks for, or what is missing of them, and opens them.

    Args:
        embedded: the target is the embedded one, which by itself continues beginnings from the
            standard library's files that are not held out.

    Raises:
        UserError: naming the flag, or the file and line, that is wrong; or the first setting that
            differs from those the folder was begun with.
    """
    check_length(plan, target)
    if plan.data == (SESSIONS,):
        for flag, value in (("--prompts", plan.prompts), ("--prefixes", plan.prefixes)):
            if value:
                raise UserError(f"{flag} is for --data {SELF} or {REGENERATED}, found --data {SESSIONS}")
        recipe = sessions_recipe(pathlib.Path(folder), target, tokenizer, plan)
    else:
        recipe = _recipe(target, Renderer(tokenizer), plan, embedded)
    return write_rows(folder, recipe)


def check_length(plan: DataPlan, target: Target) -> None:
    """Raises UserError for rows longer than the target can read."""
    if target.context_length is not None and plan.length > target.context_length:
        raise UserError(
            f"--row-length is {plan.length}, expected at most the target's context of {target.context_length}"
        )


def _recipe(target: Target, renderer: Renderer, plan: DataPlan, embedded: bool) -> Recipe:
    if plan.data not in ((SELF,), (REGENERATED,)):
        for name in (SELF, REGENERATED, SESSIONS):
            if name in plan.data:
                raise UserError(f"--data {' '.join(plan.data)}: {name!r} stands alone, without files beside it")
        for flag, value in (("--prompts", plan.prompts), ("--prefixes", plan.prefixes)):
            if value:
                raise UserError(f"{flag} is for --data {SELF} or {REGENERATED}, found --data {' '.join(plan.data)}")
        return files_recipe(renderer, plan)
    writer = Writer(target.model, renderer, plan)
    if plan.prompts is not None:
        if plan.prefixes:
            raise UserError("--prompts and --prefixes: expected one of them")
        return answers_recipe(writer, read_questions(plan.prompts, "--prompts"))
    if plan.data == (REGENERATED,):
        raise UserError(f"--data {REGENERATED}: expected a file of prompts, --prompts FILE")
    if plan.prefixes:
        return prefixes_recipe(writer, Texts.of_files(plan.prefixes))
    if embedded:
        texts = [text for _, text, held_out, _ in stdlib_files() if not held_out and text]
        return prefixes_recipe(writer, Texts.of_strings("the standard library", texts))
    if renderer.has_template and renderer.opening():
        return invented_recipe(writer)
    return bare_recipe(writer)
