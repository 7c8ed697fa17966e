"""One step: one lazy graph, and one call of the target on exactly its rows."""

import mlx.core as mx
import pytest
from support import REPEATING, make_drafter
from support.medusa import make_heads
from support.steps import first_step
from support.texts import by_mlx_lm

from mlx_redrafter.decoding.loop import speculative
from mlx_redrafter.decoding.planner import Planner
from mlx_redrafter.decoding.sampling import greedy
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.lookup import LookupProposer
from mlx_redrafter.drafting.proposers import MedusaProposer, RecurrentProposer
from mlx_redrafter.drafting.shape import Drafted, DraftShape, LookedUp
from mlx_redrafter.target.probe import verifier_of


def recurrent(embed, **changes):
    return RecurrentProposer(make_drafter(**changes), embed)


def of_several_layers(embed):
    return recurrent(embed, context_layers=(1, 2))


def beside_lookup(embed):
    return LookupProposer(recurrent(embed), None)


def medusa(embed):
    return MedusaProposer(make_heads())


@pytest.mark.parametrize("budget", [1, 5, 12, 16])
def test_one_call_of_the_target_per_step_on_exactly_its_rows(small_model, budget):
    """If this fails, a step reads the target's weights more than once, or checks rows nobody asked for."""
    verifier = verifier_of(small_model)
    rows, original = [], type(small_model).__call__

    def counting(self, inputs, *args, **kwargs):
        rows.append(inputs.shape)
        return original(self, inputs, *args, **kwargs)

    type(small_model).__call__ = counting
    try:
        shape = DraftShape(4, 5, budget)
        cache = verifier.make_cache()
        proposer, options = RecurrentProposer(make_drafter(), verifier.target.embed), DecodingOptions(greedy, 20)
        planner = Planner(Drafted(shape))
        produced = list(speculative(verifier, proposer, mx.array([[1, 2, 3]]), cache, options, planner))
    finally:
        type(small_model).__call__ = original
    assert rows[:2] == [(1, 2), (1, 1)]  # the prompt: all but its last token, then that one
    assert set(rows[2:]) == {(1, 1 + budget)}
    assert len(rows) - 2 in (len(produced) - 1, len(produced))  # one step may have been submitted ahead


class Built(Exception):
    """Raised where a graph has been built without a value having been read."""


@pytest.mark.parametrize(
    "who, plan",
    [
        *((of_several_layers, Drafted(DraftShape(w, 5, 4 * w, p))) for w in (1, 4) for p in ("best-first", "beams")),
        *((beside_lookup, Drafted(shape, with_lookup=True)) for shape in (DraftShape(), DraftShape(4, 5, 7))),
        (beside_lookup, LookedUp(7)),
        (medusa, Drafted(DraftShape(16, 5, 63))),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_step_is_one_lazy_graph(small_model, who, plan, in_one_piece):
    """If this fails, the host waits for the device in the middle of a step.

    While mx.compile traces a function, reading any value that depends on its inputs raises.
    """
    verifier = verifier_of(small_model)
    step = first_step(verifier, [REPEATING], who(verifier.target.embed))
    buffers = [(layer.keys, layer.values) for layer in step.cache.layers]

    def traced(context, root, length, text, buffers):
        step.context, step.root, step.cache.length = context, root, length
        if text:
            step.proposer.text.tokens, step.proposer.text.end = text
        for layer, (keys, values) in zip(step.cache.layers, buffers):
            layer.keys, layer.values = keys, values
        step(plan)
        raise Built  # the graph stands; compiling it would only cost time

    with pytest.raises(Built):
        mx.compile(traced)(step.context, step.root, step.cache.length, step.proposer.arrays(), buffers)
    with pytest.raises(ValueError, match="transform"):
        mx.compile(lambda x: mx.array(int(x.item())))(mx.array(1))  # tracing does catch a read


def test_steps_in_a_batch(small_model):
    """If this fails, shapes are not batch first: rows of a batch mix."""
    verifier, prompts = verifier_of(small_model), [[1, 2, 3], [7, 5, 9]]
    step = first_step(verifier, prompts, recurrent(verifier.target.embed))
    texts = [[t] for t in step.root.tolist()]
    for _ in range(8):
        submitted = step(Drafted(DraftShape(4, 5, 12)))
        for b in range(2):
            texts[b] += submitted.tokens[b, : submitted.count[b].item() + 1].tolist()
    for b in range(2):
        assert texts[b] == by_mlx_lm(small_model, prompts[b], len(texts[b]))
