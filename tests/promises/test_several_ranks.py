"""A model that is split over several processes writes what one process writes, whatever each of them measures."""

import random

import pytest
from mlx_redrafter.benchmarks.architectures import small_models
from support import several
from support.costs import made_up
from support.hybrids import write_pair

from mlx_redrafter.tuning import session

NAMES = {
    "tensor": ["llama", "qwen3", "qwen3_moe", "deepseek_v3", "gpt_oss", "ministral3"],
    "pipeline": ["qwen2", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite"],
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
    check(tmp_path, monkeypatch, 2, "tensor", ["llama"], 10, ["auto", "structured", "processor"])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("split", list(NAMES))
def test_every_way_to_split(tmp_path, monkeypatch, size, split):
    """If this fails, one of the ways to split, choose and draft gives another text."""
    ways = [way for way in several.WAYS if way != "measured"]
    check(tmp_path, monkeypatch, size, split, NAMES[split], 32, [*ways, "turns", "batch"])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_windows_in_a_pipeline(tmp_path, monkeypatch, size):
    """If this fails, processes that find out for themselves what their layers can do go different ways.

    Of three processes one has a layer with a window and one has none: they decode plainly.
    """
    check(tmp_path, monkeypatch, size, "pipeline", ["ministral3"], 16, ["plain", "tree", "auto"])


@pytest.mark.slow
@pytest.mark.parametrize("split", list(NAMES))
def test_costs_are_measured_together(tmp_path, monkeypatch, split):
    """If this fails, processes that measure what steps cost wait for each other for ever."""
    check(tmp_path, monkeypatch, 2, split, ["qwen2"], 16, ["measured"])


def generating(folder, size, monkeypatch):
    """The words of a long text by a model that so many processes can divide."""
    for key, value in several.WIDTHS.items():
        monkeypatch.setitem(small_models.CONFIGS["common"], key, value)
    pair = write_pair("qwen2", folder, monkeypatch)
    return ["generate", *pair, "--prompt", "import", "-m", "480", "--num-draft-tokens", "3", "--ignore-chat-template"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_a_process_that_dies_ends_the_others(tmp_path, monkeypatch, size):
    """If this fails, a Mac that goes leaves the others waiting for ever, or nobody says which it was."""
    words, chance = generating(tmp_path, size, monkeypatch), random.Random(size)
    for _ in range(10):
        running, victim = several.started(tmp_path, [words] * size), chance.randrange(size)
        running[0].stdout.read(chance.randrange(1, 40))  # a text is under way
        running[victim].kill()
        said = "".join(process.communicate(timeout=10)[1] for process in running)
        others = "it cannot" if size == 2 else "the others cannot"
        assert several.ours(said) == [f"mlx-redrafter: error: rank {victim} of {size} is gone, {others} go on"]
        assert [p.returncode for p in running] == [-9 if rank == victim else 1 for rank in range(size)]


@pytest.mark.slow
def test_processes_that_differ_stop(tmp_path, monkeypatch):
    """If this fails, machines with different settings write a text that neither of them would write alone."""
    words = generating(tmp_path, 2, monkeypatch)
    running = several.started(tmp_path, [words, [*words, "--seed", "3"]])
    assert [process.communicate(timeout=100)[1] for process in running] == [
        "mlx-redrafter: error: rank 1: --seed is 3, expected 0, as on rank 0\n",
        "",
    ]
    assert [process.returncode for process in running] == [2, 2]
