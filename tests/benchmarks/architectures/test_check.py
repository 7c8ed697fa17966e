"""Models of every kind: what they can be used for, and that their text stays mlx_lm's."""

import mlx.core as mx
import pytest
from mlx_redrafter.benchmarks.architectures import __main__ as table
from mlx_redrafter.benchmarks.architectures import check as architectures
from mlx_redrafter.benchmarks.architectures.small_models import modules

from mlx_redrafter.target.verification import CHAIN, NONE, TREE


@pytest.fixture(autouse=True, scope="module")
def without_a_compiler():
    """mx.compile calls a C++ compiler for every new shape on a CPU."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize(
    "module, capability",
    [
        ("qwen3", TREE),  # dense
        ("gpt_oss", TREE),  # windows, sinks, experts
        pytest.param(
            "gemma3n", TREE, marks=pytest.mark.slow
        ),  # layers that share keys and values, windows, soft-caps, a language model inside
        ("deepseek_v3", TREE),  # latent attention, experts
        ("gpt2", TREE),  # learned positions, known per batch entry only
        ("qwen3_next", CHAIN),  # gated delta nets beside attention
        pytest.param("mamba", CHAIN, marks=pytest.mark.slow),  # states only
        pytest.param("recurrent_gemma", CHAIN, marks=pytest.mark.slow),  # states beside windows
        ("llama4", NONE),  # chunks
    ],
)
def test_a_kind_of_model(module, capability):
    """If this fails, a model of this kind loses its drafts, or writes another text with them."""
    outcome = architectures.check(module)
    assert (outcome.capability, outcome.equal) == (capability, True), outcome.reason
    # gpt2 verifies trees, too, at the cost of reading keys and values once per row, and says so.
    assert bool(outcome.reason) == (capability != TREE or module == "gpt2")
    if capability != NONE:
        assert outcome.perfect > 4 and outcome.taps is not None and outcome.taps > 4


def test_a_text_that_differs_is_noticed(monkeypatch):
    """If this fails, the table says equal whatever is written."""
    drafted = architectures.drafted
    monkeypatch.setattr(architectures, "drafted", lambda *a: ([0, *drafted(*a)[0][1:]], 1.0))
    outcome = architectures.check("llama4")
    assert outcome.equal is False and "another text without a drafter" in outcome.reason


@pytest.mark.slow
def test_every_module(tmp_path):
    """If this fails, a model module crashes, writes another text, or too many cannot be drafted for."""
    outcomes = list(table.check_all(modules()))
    assert [o.module for o in outcomes] == modules()
    decoding = [o for o in outcomes if o.equal is not None]
    assert len(decoding) > 0.9 * len(outcomes)
    assert [o.module for o in decoding if not o.equal] == []
    assert sum(o.capability != NONE for o in outcomes) >= 0.9 * len(outcomes)
    attention = [o for o in decoding if "states" not in o.layers]
    assert sum(o.capability == TREE for o in attention) >= 0.75 * len(attention)
    assert all(o.reason for o in outcomes if o.capability != TREE)
