"""Heads with prefix attention, on models of every kind: the text is the target's."""

import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_redrafter.benchmarks.architectures import small_models
from mlx_redrafter.benchmarks.architectures.check import PROMPT
from mlx_redrafter.benchmarks.architectures.small_models import random_drafter

from mlx_redrafter.decoding.sampling import greedy, position_keyed
from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.generate import stream_generate

COUNT, TREE = 40, DraftShape(3, 4, 7)


pytestmark = pytest.mark.usefixtures("without_a_compiler")


def written(model, tokenizer, prompt, drafter, shape=TREE, **options):
    responses = stream_generate(model, tokenizer, prompt, drafter, max_tokens=COUNT, shape=shape, **options)
    return [r.token for r in responses][:COUNT]


ONE_LAYER = [(module, 1) for module in ("llama", "qwen3", "gemma3_text", "qwen3_moe", "qwen3_next")]


@pytest.mark.parametrize(("module", "deep"), [*ONE_LAYER, ("llama", 2)])
def test_texts(module, deep, tokenizer):
    """If this fails, prefix attention changes the text."""
    model = small_models.build(module)
    target = Target.of(model)
    layers = (1, target.num_layers)
    drafter = random_drafter(target, context_layers=layers, prefix_window=5, prefix_layers=deep)
    for choose in (greedy, position_keyed(0.8, seed=3)):
        plain = written(model, tokenizer, PROMPT, None, chooser=choose)
        assert written(model, tokenizer, PROMPT, drafter, chooser=choose, prefill_step_size=3) == plain
        assert written(model, tokenizer, PROMPT, drafter, DraftShape(1, 4, 3), chooser=choose, lookup="on") == plain
        assert written(model, tokenizer, PROMPT, drafter, "auto", chooser=choose) == plain


@pytest.mark.parametrize("deep", [1, 2])
def test_a_conversation(deep, tokenizer):
    """If this fails, a head with prefix attention cannot go on from a prompt cache."""
    model = small_models.build("llama")
    drafter = random_drafter(Target.of(model), prefix_window=5, prefix_layers=deep)
    cache = make_prompt_cache(model)
    first = written(model, tokenizer, PROMPT[:4], drafter, prompt_cache=cache)
    kept = [*PROMPT[:4], *first]
    rest = written(model, tokenizer, [*kept, *PROMPT[4:]], None)
    assert written(model, tokenizer, PROMPT[4:], drafter, prompt_cache=cache, cached_tokens=kept) == rest
