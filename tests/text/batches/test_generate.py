import pytest
from mlx_lm.generate import batch_generate as theirs
from mlx_lm.models.cache import KVCache

import mlx_redrafter
from mlx_redrafter import DraftShape, UserError, batch_generate, stream_generate
from mlx_redrafter.decoding.sampling import position_keyed
from mlx_redrafter.drafting.cached.draft_model import DraftModel
from mlx_redrafter.target.model import Target

PROMPTS = ["import os\n", "def f(x):\n    return", "class A:\n"]

pytestmark = pytest.mark.usefixtures("drafting_pays")


@pytest.fixture(scope="module")
def pair():
    return mlx_redrafter.load()


def test_texts_tokens_and_logprobs_are_mlx_lms(pair):
    """If this fails, what used mlx_lm's function gets something else from ours."""
    model, drafter, tokenizer = pair
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    asked = {"max_tokens": [5, 12, 9], "return_token_ids": True, "return_logprobs": True}
    expected = theirs(model, tokenizer, ids, **asked)
    for options in ({}, {"drafter": drafter, "shape": DraftShape(3, 4, 6)}, {"drafter": drafter}):
        found = batch_generate(model, tokenizer, ids, completion_batch_size=2, **asked, **options)
        assert (found.texts, found.token_ids) == (expected.texts, expected.token_ids)
        for ours, other in zip(found.logprobs, expected.logprobs, strict=True):
            assert ours == pytest.approx(other, abs=1e-3)
        assert found.stats.generation_tokens == 26 and found.stats.prompt_tokens == sum(map(len, ids))
        assert found.stats.generation_tps > 0 and found.stats.prompt_tps > 0
        if options:
            assert found.stats.mean_acceptance_length > 1.2
    assert batch_generate(model, tokenizer, []).texts == []


def test_each_text_is_looked_up_in_itself(pair):
    """If this fails, texts that repeat themselves are written no faster together, or not as they are alone."""
    model, drafter, tokenizer = pair
    asked = {"max_tokens": 24, "return_token_ids": True}
    prompts = ["x = [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2,", *PROMPTS]
    expected = batch_generate(model, tokenizer, prompts, **asked).token_ids
    for options in ({}, {"drafter": drafter}, {"drafter": drafter, "shape": DraftShape(3, 4, 6)}):
        found = batch_generate(model, tokenizer, prompts, lookup="on", **options, **asked)
        assert found.token_ids == expected and found.stats.mean_acceptance_length > 1.2
    with pytest.raises(UserError, match="lookup is 'sometimes'"):
        batch_generate(model, tokenizer, prompts, lookup="sometimes")


def test_a_draft_model(pair):
    """If this fails, a small model cannot draft for several texts, or changes them."""
    model, _, tokenizer = pair
    small = DraftModel(model, tokenizer)
    small.fit(Target.of(model), tokenizer, "itself")
    asked = {"max_tokens": 9, "return_token_ids": True}
    found = batch_generate(model, tokenizer, PROMPTS, drafter=small, shape=DraftShape(), **asked)
    assert found.token_ids == batch_generate(model, tokenizer, PROMPTS, **asked).token_ids
    assert found.stats.mean_acceptance_length > 2


def test_each_prompt_has_its_seed(pair):
    """If this fails, a seed's text depends on who else is in the batch."""
    model, drafter, tokenizer = pair
    choosers = [position_keyed(0.8, seed) for seed in (1, 2, 3)]
    found = batch_generate(
        model, tokenizer, PROMPTS, max_tokens=16, chooser=choosers, drafter=drafter, return_token_ids=True
    )
    for ids, prompt, chooser in zip(found.token_ids, PROMPTS, choosers, strict=True):
        assert ids == [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=16, chooser=chooser)]


def test_caches_go_on(pair):
    """If this fails, a returned cache lacks a token, or what was given as one is changed."""
    model, drafter, tokenizer = pair
    shape = DraftShape(1, 4, 3)
    first = batch_generate(
        model, tokenizer, PROMPTS, max_tokens=6, drafter=drafter, shape=shape, return_prompt_caches=True,
        return_token_ids=True,
    )  # fmt: skip
    sizes = [cache[0].offset for cache in first.caches]
    assert sizes == [len(tokenizer.encode(p)) + 6 for p in PROMPTS]
    more = [tokenizer.encode("#", add_special_tokens=False)] * 3
    second = batch_generate(
        model, tokenizer, more, first.caches, 6, drafter=drafter, shape=shape, return_token_ids=True
    )
    assert [cache[0].offset for cache in first.caches] == sizes
    for prompt, ids, add, rest in zip(PROMPTS, first.token_ids, more, second.token_ids, strict=True):
        whole = tokenizer.encode(prompt) + ids + add
        assert rest == [r.token for r in stream_generate(model, tokenizer, whole, max_tokens=6)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_tokens": [1, 2]}, "max_tokens has 2 entries, expected one for each of the 3 prompts"),
        ({"completion_batch_size": 0}, "completion_batch_size is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"prompt_caches": [[KVCache()]] * 3}, "prompt_caches has 1 layers, expected 7"),
    ],
)
def test_mistakes(pair, options, message):
    with pytest.raises(UserError, match=message):
        batch_generate(pair[0], pair[2], PROMPTS, **options)


def test_one_prompt_is_no_list(pair):
    """If this fails, every letter of a prompt gets a text of its own."""
    with pytest.raises(UserError, match="prompts is a str, expected a list"):
        batch_generate(pair[0], pair[2], "import")
