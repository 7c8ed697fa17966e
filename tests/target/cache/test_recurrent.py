"""Layers with a state: what rejected tokens leave in them, which must be nothing."""

import copy

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_tokenizer
from mlx_redrafter.benchmarks.architectures.small_models import PerfectDrafter, build, random_drafter

import mlx_redrafter
from mlx_redrafter.drafting.shape import DraftShape
from mlx_redrafter.system.module_slots import slots
from mlx_redrafter.target.cache.kv_cache import leaves
from mlx_redrafter.target.cache.recurrent import AT_ONCE, ROW_BY_ROW
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import CHAIN
from mlx_redrafter.text.loading import EMBEDDED

PROMPT = [5, 40, 77, 3, 12, 60, 31]


pytestmark = pytest.mark.usefixtures("without_a_compiler")


@pytest.fixture(scope="module", params=["qwen3_next", "jamba"])
def hybrid(request):
    """One model whose mixers know mlx-lm's lengths, and one whose do not; attention beside both."""
    return build(request.param)


def chain(tokens):
    parents = mx.array([[0, *range(len(tokens) - 1)]], mx.int32)
    return CandidateTree.from_parents(mx.array([tokens], mx.int32), parents, len(tokens) - 1)


def states(layers):
    return [array for cache in leaves(layers) if hasattr(cache, "cache") for array in cache.cache]


def after(model, tokens):
    """mlx-lm's states after reading tokens one by one."""
    cache = make_prompt_cache(model)
    for token in tokens:
        model(mx.array([[token]]), cache=cache)
    return states(cache)


def assert_close(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert mx.abs(mine - theirs).max().item() < 1e-4 * max(1.0, mx.abs(theirs).max().item())


def test_each_way_is_taken_where_it_works(hybrid):
    verifier = verifier_of(hybrid)
    assert verifier.capability == CHAIN and verifier.reason
    assert verifier.found.replay == (ROW_BY_ROW if hybrid.model_type == "jamba" else AT_ONCE)
    assert len(verifier.found.mixers) == 2


@pytest.mark.parametrize("accepted", [1, 2, 4])
def test_states_end_where_the_accepted_rows_end(hybrid, accepted):
    """If this fails, rejected tokens stay in the state, or accepted ones are missing."""
    verifier = verifier_of(hybrid)
    cache = verifier.make_cache()
    verifier.target.forward(mx.array([PROMPT]), cache.layers)
    cache.begin_trees(length=len(PROMPT))
    rows, read = [9, 33, 71, 50], list(PROMPT)
    for _ in range(2):
        verifier(chain(rows), cache)
        cache.commit(None, mx.array([accepted - 1], mx.int32), 3)
        read += rows[:accepted]
        assert_close(states(cache.layers), after(hybrid, read))


@pytest.mark.parametrize("back", range(7))
def test_back_to_any_of_the_last_tokens(hybrid, back):
    """If this fails, a loop that is left early hands back states of text that nobody saw."""
    verifier = verifier_of(hybrid)
    cache = verifier.make_cache()
    verifier.target.forward(mx.array([PROMPT]), cache.layers)
    cache.begin_trees(length=len(PROMPT))
    read = list(PROMPT)
    for rows in ([9, 33, 71, 50], [8, 22, 17, 63]):
        verifier(chain(rows), cache)
        cache.commit(None, mx.array([2], mx.int32), 3)
        read += rows[:3]
    length = len(read) - back
    cache.end_trees(length)
    assert_close(states(cache.layers), after(hybrid, read[:length]))


def test_no_weight_matrix_of_a_mixer_is_read_twice(hybrid, monkeypatch):
    """If this fails, taking tokens back costs a second pass over the mixers' weights."""
    verifier = verifier_of(hybrid)
    cache = verifier.make_cache()
    verifier.target.forward(mx.array([PROMPT]), cache.layers)
    cache.begin_trees(length=len(PROMPT))
    inside = {
        id(slot.module)
        for slot in slots(hybrid)
        if isinstance(slot.module, nn.Linear) and slot.path.startswith(verifier.found.mixers)
    }
    verifier(chain([9, 33, 71, 50]), cache)
    calls, original = [], nn.Linear.__call__
    monkeypatch.setattr(nn.Linear, "__call__", lambda self, x: calls.append(id(self)) or original(self, x))
    cache.commit(None, mx.array([1], mx.int32), 3)
    assert inside and not set(calls) & inside


def test_nothing_is_read_on_the_host(hybrid, in_one_piece):
    """If this fails, every step waits for the device. What mx.compile traces has no values to read."""
    verifier = verifier_of(hybrid)
    cache = verifier.make_cache()
    verifier.target.forward(mx.array([PROMPT]), cache.layers)
    cache.begin_trees(length=len(PROMPT))

    def traced(tokens, count, length):
        cache.length = length
        verifier(CandidateTree.from_parents(tokens, mx.array([[0, 0, 1]], mx.int32), 2), cache)
        cache.commit(None, count, 2)
        return cache.arrays()

    mx.enable_compile()
    try:
        mx.compile(traced)(mx.array([[9, 33, 71]]), mx.array([1], mx.int32), cache.length)
    finally:
        mx.disable_compile()


@pytest.mark.parametrize("taken", [2, 5, 11])
def test_a_prompt_cache_goes_on_from_any_token(hybrid, taken):
    """If this fails, a conversation with a hybrid model goes on from another text than was shown."""
    tokenizer = load_tokenizer(EMBEDDED / "target")
    tokenizer.eos_token_ids = []
    text = [r.token for r in mlx_redrafter.stream_generate(hybrid, tokenizer, PROMPT, max_tokens=24)]
    drafter = PerfectDrafter(verifier_of(hybrid).target, PROMPT, text)
    for drafts in (drafter, random_drafter(verifier_of(hybrid).target)):
        cache, shape = make_prompt_cache(hybrid), DraftShape(1, 4, 3)
        stream = mlx_redrafter.stream_generate(
            hybrid, tokenizer, PROMPT, drafts, max_tokens=24, shape=shape, prompt_cache=cache
        )
        first = [next(stream).token for _ in range(taken)]
        stream.close()
        assert first == text[:taken]
        assert_close(states(cache), after(hybrid, [*PROMPT, *text[:taken]]))
        assert {type(c).__name__ for c in cache} == {type(c).__name__ for c in make_prompt_cache(hybrid)}
        rest = mlx_redrafter.stream_generate(
            hybrid, tokenizer, text[taken : taken + 1], drafts, max_tokens=6, prompt_cache=copy.copy(cache)
        )
        assert [r.token for r in rest][:6] == text[taken + 1 : taken + 7]
