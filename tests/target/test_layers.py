"""Hidden states between layers: found in any model that runs its layers in order, and refused elsewhere."""

import threading

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_redrafter.benchmarks.architectures import small_models
from support import make_model

from mlx_redrafter.drafting.pairing import check_pair
from mlx_redrafter.errors import UserError
from mlx_redrafter.system.module_slots import StandIn, slots, standing_in
from mlx_redrafter.target.layers import RawLayers
from mlx_redrafter.target.model import Target

TOKENS = mx.array([[3, 14, 15, 92, 65]])


pytestmark = pytest.mark.usefixtures("without_a_compiler")


def by_hand(model):
    """The hidden states of a Llama after each of its layers, the last one after the final norm."""
    hidden, found = model.model.embed_tokens(TOKENS), []
    for layer in model.layers:
        hidden = layer(hidden, "causal", None)
        found.append(hidden / mx.sqrt(mx.mean(hidden * hidden, axis=-1, keepdims=True) + 1e-6))
    return [*found[:-1], model.model.norm(hidden)]


def test_raw_layers(small_model):
    """If this fails, an EAGLE-3 head reads other numbers than it was trained with elsewhere."""
    hidden, after = small_model.model.embed_tokens(TOKENS), []
    for layer in small_model.layers:
        hidden = layer(hidden, "causal", None)
        after.append(hidden)
    found, _ = Target(small_model).forward(TOKENS, [None] * 2, context_layers=RawLayers((2, 1)))
    assert mx.allclose(found, mx.concatenate(after[::-1], axis=-1), atol=1e-5)


@pytest.mark.parametrize("layers", [(1,), (2,), (1, 2)])
def test_contexts_of_layers(small_model, layers):
    """If this fails, a head reads the hidden states of other layers than it learned from, or of another size."""
    target, after = Target(small_model), by_hand(small_model)
    before = {name: type(module) for name, module in small_model.named_modules()}
    found, logits = target.forward(TOKENS, make_prompt_cache(small_model), context_layers=layers)
    expected = mx.concatenate([after[n - 1] for n in layers], axis=-1)
    assert found.shape == (1, 5, target.context_size(layers)) and mx.allclose(found, expected, atol=1e-5)
    assert mx.allclose(logits, small_model(TOKENS), atol=1e-5)
    assert {name: type(module) for name, module in small_model.named_modules()} == before
    last, _ = target.forward(TOKENS, make_prompt_cache(small_model))
    assert mx.allclose(last, after[-1], atol=1e-5)


def test_only_what_is_asked_for_is_kept(small_model, monkeypatch):
    """If this fails, hidden states that no head reads take memory."""
    hung = []
    monkeypatch.setattr(
        "mlx_redrafter.target.model.standing_in", lambda given: hung.append(len(given)) or standing_in(given)
    )
    target = Target(small_model)
    for layers in ((), (2,), (1,)):
        target.forward(TOKENS, make_prompt_cache(small_model), context_layers=layers)
    assert hung == [hung[0], hung[0], hung[0] + 1]


def test_other_threads_call_the_layers_themselves(small_model, monkeypatch):
    """If this fails, a thread that reads with the same model overwrites what the drafter is to read."""
    target, expected = Target(small_model), by_hand(small_model)[0]
    whole = type(small_model).__call__

    def interrupted(model, *args, **kwargs):
        logits = whole(model, *args, **kwargs)
        other = threading.Thread(target=whole, args=(model, TOKENS[:, :2]))
        other.start()
        other.join()
        return logits

    monkeypatch.setattr(type(small_model), "__call__", interrupted)
    found, _ = target.forward(TOKENS, make_prompt_cache(small_model), context_layers=(1,))
    assert mx.allclose(found, expected, atol=1e-5)


def test_another_stand_in_stays_at_work(small_model):
    """If this fails, a layer that reads a recurrent state itself loses the stand-in that takes rows back."""
    target, called, expected = Target(small_model), list[int](), by_hand(small_model)[0]
    assert target.num_layers == 2

    class Counting(StandIn):
        def call(self, *args, **kwargs):
            called.append(1)
            return self.module(*args, **kwargs)

    slot = next(slot for slot in slots(small_model) if slot.module is small_model.layers[0])
    with standing_in([(slot, Counting(slot.module))]):
        found, _ = target.forward(TOKENS, make_prompt_cache(small_model), context_layers=(1,))
    assert called == [1] and mx.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("module, layers", [("nanbeige", 4), ("gemma3n", 6), ("gemma4_text", 6), ("olmo_hybrid", 4)])
def test_unusual_models(module, layers):
    """If this fails, models that loop, carry several streams, return tuples or ask layers for their kind go wrong."""
    target = Target(small_models.build(module))
    given, logits = target.forward(TOKENS, make_prompt_cache(target.model), context_layers=(1, layers - 1))
    assert mx.allclose(logits, target.model(TOKENS, cache=make_prompt_cache(target.model)), atol=1e-4)
    assert target.num_layers == layers and given.shape == (1, 5, 2 * target.hidden_size)
    size = mx.mean(given * given, axis=-1)
    assert mx.allclose(size, mx.ones_like(size), atol=1e-2) and not mx.allclose(*mx.split(given, 2, axis=-1))


def test_heads_that_do_not_fit():
    """If this fails, a head that reads layers the target has not got, or does not show, ends in a traceback."""
    target = Target(make_model())
    with pytest.raises(UserError, match="drafter: layer 3 is to be read, but the target has 2 layers"):
        check_pair(target, small_models.random_drafter(target, context_layers=(1, 3)))
    hidden = Target(small_models.build("iquestloopcoder"))  # calls parts of its layers
    with pytest.raises(UserError, match="drafter: hidden states between this target's layers cannot be read: its "):
        check_pair(hidden, small_models.random_drafter(hidden, context_layers=(1, 2)))
    check_pair(hidden, small_models.random_drafter(hidden))
