"""A model that is split over several processes writes what one process writes, whatever each of them measures."""

import pytest
from support import several
from support.costs import made_up

from mlx_redrafter.tuning import session

NAMES = {
    "tensor": ["llama", "qwen3", "qwen3_moe", "deepseek_v3", "gpt_oss", "ministral3"],
    "pipeline": ["qwen2", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "ministral3"],
}


def check(folder, monkeypatch, size, split, names, count, ways):
    monkeypatch.setenv("MLX_REDRAFTER_TUNING", "off")
    found = several.launched(folder, size, split, names, count, ways)
    monkeypatch.setattr(session, "measure", lambda *_: made_up(lambda rows: 1.0 if rows <= 8 else 9.0, plain=9.0))
    for name in names:
        expected = several.texts_of(name, count, ways)
        for rank, texts in enumerate(found):
            assert texts[name] == expected, f"{name}, rank {rank}"


def test_two_processes_write_what_one_does(tmp_path, monkeypatch):
    """If this fails, a model that is split writes another text, or processes wait for each other for ever."""
    check(tmp_path, monkeypatch, 2, "tensor", ["llama"], 10, ["auto"])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("split", list(NAMES))
def test_every_way_to_split(tmp_path, monkeypatch, size, split):
    """If this fails, one of the ways to split, choose and draft gives another text."""
    check(tmp_path, monkeypatch, size, split, NAMES[split], 32, [*several.WAYS, "turns", "batch"])
