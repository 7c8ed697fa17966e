"""Models that tests share. mlx_redrafter comes first: it puts OpenBLAS in front of MLX's BLAS."""

from __future__ import annotations

import pathlib

import mlx_redrafter  # isort: skip

import mlx.core as mx
import pytest
from mlx_lm.models.llama import Model, ModelArgs

from mlx_redrafter import early
from mlx_redrafter.drafter import DrafterConfig, RecurrentDrafter
from mlx_redrafter.embedded.corpus import held_out_prefixes

SHARED = pathlib.Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def tuning_folder(tmp_path_factory):
    """What is measured of pairs stays out of the user's cache, and takes no two seconds a pair."""
    folder = tmp_path_factory.mktemp("tuning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_REDRAFTER_TUNING", str(folder))
        patch.setattr(mlx_redrafter.costs, "SECONDS", 0.0)
        yield folder


@pytest.fixture(scope="session")
def pair():
    """The embedded (model, drafter, tokenizer) in float32."""
    return mlx_redrafter.load()


@pytest.fixture(scope="session")
def prefixes(pair) -> list[list[int]]:
    """Token ids of 30 beginnings that the embedded target never saw in training."""
    found = held_out_prefixes(30)
    assert len(found) == 30
    return [pair[2].encode(text) for text in found]


@pytest.fixture(scope="session")
def stories() -> pathlib.Path:
    path = SHARED / "models" / "stories260K"
    if not path.exists():
        pytest.skip("../shared/models/stories260K is not here")
    return path


@pytest.fixture
def in_one_piece():
    """While it lasts, a step is sent to the device as a whole, as on a GPU; mx.compile can trace it."""
    with early.in_one_piece():
        yield


@pytest.fixture
def chains_only(monkeypatch):
    """While it lasts, rope takes one position for a whole call, as in models that read it on the host."""
    fast_rope = mx.fast.rope

    def rope(x, dims, *, offset, **options):
        if isinstance(offset, mx.array) and offset.size > 1:
            raise ValueError("one position is all that this rope takes")
        return fast_rope(x, dims, offset=offset, **options)

    monkeypatch.setattr("mlx_redrafter.seams._rope", rope)


@pytest.fixture
def small_model():
    """A random Llama of two layers, vocabulary 97."""
    return make_model()


def make_model(seed: int = 0, vocab: int = 97, hidden: int = 32) -> Model:
    mx.random.seed(seed)
    args = ModelArgs(
        model_type="llama",
        hidden_size=hidden,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=vocab,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = Model(args)
    # Larger than the usual initial weights, so that choices depend on what was read.
    for module in (layer.self_attn for layer in model.layers):
        module.q_proj.weight, module.k_proj.weight = 3 * module.q_proj.weight, 3 * module.k_proj.weight
    model.lm_head.weight = 4 * model.lm_head.weight
    mx.eval(model.parameters())
    return model


def make_drafter(vocab: int = 97, hidden: int = 32, seed: int = 0, **changes) -> RecurrentDrafter:
    """A drafter of random weights, large enough that every token it reads shows in what it says."""
    mx.random.seed(seed)
    shape = {"vocab_size": vocab, "hidden_size": hidden, "exit_dim": hidden, "num_draft_layers": 2, "rnn": True}
    drafter = RecurrentDrafter(DrafterConfig(**(shape | changes)))
    drafter.lm_head.weight = 6 * drafter.lm_head.weight
    if drafter.config.rnn:
        drafter.rnn_w.weight = 6 * drafter.rnn_w.weight
    mx.eval(drafter.parameters())
    return drafter


@pytest.fixture(scope="session")
def stories_pair(stories, tmp_path_factory):
    """(model, drafter, tokenizer) of stories260K with a drafter trained for a few seconds."""
    from mlx_redrafter.cli import main

    out = tmp_path_factory.mktemp("stories") / "drafter"
    flags = ["--rows", "160", "--row-length", "48", "--iters", "150", "--batch-size", "8", "--prefix-length", "4"]
    flags += ["--held-out", "2", "--eval-every", "0", "--dtype", "float32"]
    assert main(["train", "--model", str(stories), "--out", str(out), *flags]) == 0
    return mlx_redrafter.load(str(stories), str(out))
