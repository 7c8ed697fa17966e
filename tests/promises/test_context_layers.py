"""Heads that read several layers, on models of every kind: the text is the target's, and the contexts are its own."""

import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_redrafter.benchmarks.architectures import check as architectures
from mlx_redrafter.benchmarks.architectures import small_models
from mlx_redrafter.benchmarks.architectures.small_models import PerfectDrafter, random_drafter

from mlx_redrafter.decoding.sampling import greedy, position_keyed
from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.generate import stream_generate

PROMPT, COUNT = architectures.PROMPT, 40
SHAPE = DraftShape(3, 4, 7)


pytestmark = pytest.mark.usefixtures("without_a_compiler")


def written(model, tokenizer, prompt, drafter, **options):
    """Tokens, and tokens per step."""
    responses = list(stream_generate(model, tokenizer, prompt, drafter, max_tokens=COUNT, shape=SHAPE, **options))
    return [r.token for r in responses][:COUNT], responses[-1].mean_acceptance_length


@pytest.mark.parametrize("module", ["llama", "qwen3", "gemma3_text", "qwen3_moe", "qwen3_next"])
def test_texts_and_contexts(module, tokenizer):
    """If this fails, contexts of several layers change the text, or are not those of the accepted tokens.

    The drafter that knows the text finds its place by its context: of a wrong row it would draft the wrong tokens.
    """
    model = small_models.build(module)
    target = Target.of(model)
    layers = (1, target.num_layers // 2, target.num_layers)
    assert len(set(layers)) == 3
    # The last hidden state alone would do to find the place.
    for choose, contexts in ((greedy, layers[:2]), (position_keyed(0.8, seed=3), layers)):
        plain, _ = written(model, tokenizer, PROMPT, None, chooser=choose)
        foreign, _ = written(model, tokenizer, PROMPT, random_drafter(target, context_layers=layers), chooser=choose)
        knowing = PerfectDrafter(target, PROMPT, plain, contexts)
        found, steps = written(model, tokenizer, PROMPT, knowing, chooser=choose, prefill_step_size=3)
        assert foreign == found == plain and steps > 3.5
    cache = make_prompt_cache(model)
    first, _ = written(model, tokenizer, PROMPT[:4], None, prompt_cache=cache)
    kept = [*PROMPT[:4], *first]
    rest, _ = written(model, tokenizer, [*kept, *PROMPT[4:]], None)
    knowing = PerfectDrafter(target, [*kept, *PROMPT[4:]], rest, layers)
    again, steps = written(model, tokenizer, PROMPT[4:], knowing, prompt_cache=cache, cached_tokens=kept)
    assert again == rest and steps > 3.5


def test_lookup_beside_it(tokenizer):
    """If this fails, a head of several layers cannot draft beside lookup."""
    model = small_models.build("llama")
    target = Target.of(model)
    plain, _ = written(model, tokenizer, PROMPT, None)
    knowing = PerfectDrafter(target, PROMPT, plain, (1, 2))
    found, steps = written(model, tokenizer, PROMPT, knowing, lookup="on")
    assert found == plain and steps > 3.5
