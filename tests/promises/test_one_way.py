"""A prompt becomes text on one short way: how many functions and files a reader has to know of."""

import pathlib
import re
import sys
from collections.abc import Callable

from support.costs import made_up

import mlx_redrafter
from mlx_redrafter.system import openblas_layout
from mlx_redrafter.target import operations
from mlx_redrafter.tuning import session

ROOT = pathlib.Path(__file__).parents[2]
FUNCTIONS, FILES = 148, 22  # at most; to be lowered with every indirection that goes


def passed(call: Callable[[], object]) -> set[tuple[str, str]]:
    """(file, function) of all code of this project that a call runs; a comprehension counts with its function."""
    found = set()

    def note(frame, event, _):
        if event == "call":
            found.add(frame.f_code)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    ours = [(pathlib.Path(code.co_filename), code.co_qualname) for code in found]
    return {
        (str(file.relative_to(ROOT)), re.sub(r"(\.<locals>)?\.<(listcomp|genexpr|dictcomp|setcomp)>.*", "", name))
        for file, name in ours
        if file.is_relative_to(ROOT) and file.parts[len(ROOT.parts)] not in ("tests", ".venv")
    }


def test_generate_passes_few_functions(tmp_path, monkeypatch):
    """If this fails, a reader has more to follow from a prompt to its text.

    Counted is the second text of a pair. The first one also checks what the model can verify, and measures what steps
    cost here. Costs are made up, so that what is drafted does not hang on the clock: a chain of three pays by far.
    Layers are mlx's own, as on any GPU.
    """
    monkeypatch.setenv("MLX_REDRAFTER_TUNING", str(tmp_path))
    monkeypatch.setattr(session, "measure", lambda *_: made_up(lambda rows: 1.0 if rows <= 4 else 9.0, plain=9.0))
    monkeypatch.setattr(session, "_measured", {})  # by tests before this one
    monkeypatch.setattr(openblas_layout, "_faster", False)
    monkeypatch.setattr(operations, "quick", lambda *_: False)
    model, drafter, tokenizer = mlx_redrafter.load()
    text = "import os\n"
    mlx_redrafter.generate(model, tokenizer, text, drafter=drafter, max_tokens=24)
    way = passed(lambda: mlx_redrafter.generate(model, tokenizer, text, drafter=drafter, max_tokens=24))
    assert len(way) > 50  # else nothing was seen
    files = {file for file, _ in way}
    assert len(way) <= FUNCTIONS and len(files) <= FILES, "\n".join(sorted(map(str, way)))
