"""Acceptance measured on known texts is what decoding has."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_redrafter.benchmarks.ablation.acceptance import acceptance_on
from mlx_redrafter.benchmarks.ablation.texts import own_texts
from support import DATA

from mlx_redrafter.drafting.cached.eagle import EagleConfig, EagleHead
from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.drafting.medusa import MedusaConfig, MedusaHeads
from mlx_redrafter.drafting.pairing import check_pair, tie
from mlx_redrafter.drafting.redrafter import DrafterConfig, RecurrentDrafter
from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.target.model import Target
from mlx_redrafter.training.acceptance_length import acceptance_length

pytestmark = pytest.mark.usefixtures("without_a_compiler")

SHAPES = (DraftShape(1, 4, 3), DraftShape(4, 5, 7), DraftShape(4, 5, 12))


def drafters(target, texts):
    """Heads of several kinds, the untrained ones with the target's own output layer, so that some drafts are right."""
    yield "trained", open_drafter(DATA / "tiny-drafter")
    mx.random.seed(1)
    size = (target.vocab_size, target.hidden_size)
    config = DrafterConfig(*size, target.hidden_size, 1, context_layers=(1, 3), prefix_window=6, tie_output=True)
    head = RecurrentDrafter(config)
    tie(head, target)
    yield "two layers, prefix attention", head
    yield "medusa", MedusaHeads(MedusaConfig(*size, 4))
    layer = {"hidden_size": size[1], "intermediate_size": 64, "num_attention_heads": 2, "rms_norm_eps": 1e-6}
    eagle = EagleHead(EagleConfig(*size, layer, 40, context_layers=(1, 3, 3), unit_contexts=True, tie_output=True))
    frequent = np.argsort(-np.bincount(np.concatenate([text.tokens for text in texts]), minlength=size[0]))
    eagle.vocab_map = mx.array(frequent[:40].astype(np.int32))  # some of its drafts are right
    check_pair(target, eagle)
    yield "eagle", eagle


@pytest.fixture(scope="module")
def known(stories_pair, tmp_path_factory):
    """A target, prompts, and its texts of them."""
    model, _, tokenizer = stories_pair
    target = Target.of(model)
    prompts = [tokenizer.encode(text) for text in ("Once upon a time", "There was a little girl", "The dog")]
    texts = own_texts(target, prompts, 24, set(), (1, 3), tmp_path_factory.mktemp("known") / "texts.safetensors")
    assert [len(text.tokens) - text.start for text in texts] == [24] * 3
    return target, prompts, texts


@pytest.mark.parametrize("name", ["trained", "two layers, prefix attention", "medusa", "eagle"])
def test_known_texts_tell_what_decoding_accepts(name, known):
    """If this fails, recipes are compared by figures that no user would see."""
    target, prompts, texts = known
    drafter = dict(drafters(target, texts))[name]
    drafter.set_dtype(mx.float32)
    for shape in SHAPES:
        real = acceptance_length(target, drafter, prompts, shape, 24)
        assert acceptance_on(target, drafter, texts, (1, 3), shape) == pytest.approx(real), shape
    assert real > 1 or name not in ("trained", "eagle")


def test_texts_are_kept(stories_pair, tmp_path, monkeypatch):
    """If this fails, a run that goes on writes its texts anew, or takes those of other prompts."""
    model, _, tokenizer = stories_pair
    target, file = Target.of(model), tmp_path / "texts.safetensors"
    prompts = [tokenizer.encode("Once upon a time"), tokenizer.encode("The")]
    first = own_texts(target, prompts, 12, set(tokenizer.eos_token_ids), (), file)
    monkeypatch.setattr("mlx_redrafter.benchmarks.ablation.texts.write", None)
    again = own_texts(target, prompts, 12, set(tokenizer.eos_token_ids), (), file)
    for a, b in zip(first, again, strict=True):
        assert a.start == b.start and (a.tokens == b.tokens).all() and mx.array_equal(a.contexts, b.contexts)
    with pytest.raises(TypeError):
        own_texts(target, prompts[:1], 12, set(tokenizer.eos_token_ids), (), file)
