"""Fits finished drafters to text: the static tree of Medusa heads, or which tokens a recurrent head keeps.

Knows nothing of training.
"""

from __future__ import annotations

import pathlib
import tempfile

import mlx.core as mx
import numpy as np

from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.medusa import MedusaHeads
from mlx_redrafter.drafting.medusa_tree import PUBLISHED, Choice, expected_length, fit_choices, rank_accuracies
from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.device import on_cpu
from mlx_redrafter.system.files import read_json, write_json
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.text.loading import find_target, is_embedded, load_target
from mlx_redrafter.training.drafters.vocabulary import token_counts
from mlx_redrafter.training.resume import earlier_rows
from mlx_redrafter.training.text.data_plan import SELF, DataPlan
from mlx_redrafter.training.text.shards import Rows
from mlx_redrafter.training.text.sources import prepare


def counts_of(folders: list[str], vocab_size: int) -> np.ndarray:
    """How often each token is learned in rows that trainings wrote, (vocab_size,).

    Raises:
        UserError: rows that are not whole, or have other tokens.
    """
    rows = Rows(*folders)
    try:
        return token_counts(rows, vocab_size)
    except ValueError as error:
        raise UserError(f"--text {' '.join(folders)}: has tokens beyond the drafter's {vocab_size}") from error


def fit_medusa_tree(
    path: str | pathlib.Path,
    target: str | None = None,
    data: tuple[str, ...] = (SELF,),
    text: str | None = None,
    rows: int = 64,
    row_length: int = 192,
    tree_size: int = len(PUBLISHED),
    trust_remote_code: bool = False,
) -> tuple[tuple[Choice, ...], float]:
    """Fits the tree of converted heads to text and notes it in their config.json.

    Args:
        path: the heads' directory; of its config.json only medusa_choices changes.
        target: of their target, as for `load`; None for the embedded one.
        text: rows that a training wrote, in place of data; the last ones, which are held out, come first.
        rows: texts to look at, of `row_length` tokens each.

    Returns:
        the choices, and the acceptance length that they are expected to have on this text.

    Raises:
        UserError: heads of another kind or target, or text that does not fit; the config stays as it was.
    """
    for flag, value, least in (("--rows", rows, 1), ("--tree-size", tree_size, 1)):
        if value < least:
            raise UserError(f"{flag} is {value}, expected {least} or more")
    heads = open_drafter(path)
    if not isinstance(heads, MedusaHeads):
        raise UserError(f"{path}: not Medusa heads, which alone have a static tree")
    folder = find_target(target, "--target")
    model, tokenizer = load_target(folder, None, "float32" if on_cpu() else None, None, trust_remote_code)
    reader = verifier_of(model).target
    check_pair(reader, heads, str(path))
    if on_cpu() and heads.config.quantization is None:
        heads.set_dtype(mx.float32)
    with tempfile.TemporaryDirectory() as scratch:
        if text is not None:
            found = earlier_rows([text], reader, tokenizer, heads.config.medusa_num_heads)
        else:
            plan = DataPlan(data, length=row_length, rows=rows, held_out=0)
            found = prepare(scratch, reader, tokenizer, plan, embedded=is_embedded(target))
        tokens, counted = found[-rows:]
    accuracies = rank_accuracies(reader, heads, tokens.tolist(), counted=counted)
    choices = fit_choices(accuracies, tree_size)
    file = pathlib.Path(path) / "config.json"
    write_json(file, read_json(file) | {"medusa_choices": choices})
    return choices, expected_length(accuracies, choices)
