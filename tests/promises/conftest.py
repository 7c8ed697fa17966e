"""What promises about small random models share."""

from __future__ import annotations

import pytest
from mlx_lm.utils import load_tokenizer

from mlx_redrafter.drafting.cached.memory import Memory
from mlx_redrafter.text.loading import EMBEDDED


@pytest.fixture(scope="module")
def tokenizer():
    """Ids are all that counts: any tokenizer will do, as long as no token ends the text."""
    found = load_tokenizer(EMBEDDED / "target")
    found.eos_token_ids = []
    return found


@pytest.fixture
def scores_seen(monkeypatch):
    """The scores of the last rows, each time that a drafter's memory is asked for them."""
    seen, last = [], Memory.last

    def spied(memory):
        found = last(memory)
        seen.append(found[1])
        return found

    monkeypatch.setattr(Memory, "last", spied)
    return seen
