"""Speculative decoding writes what plain decoding writes: the promise of the whole project. And threads take turns."""

import functools
import itertools
import threading
import time

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import quantize_model
from support import REPEATING, Script, make_drafter, make_model, plainly
from support.texts import by_mlx_lm

from mlx_redrafter.decoding.loop import Turns, autoregressive, in_turns, speculative, wait_for
from mlx_redrafter.decoding.planner import Planner
from mlx_redrafter.decoding.sampling import greedy, position_keyed
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.lookup import LookupProposer, TextIndex
from mlx_redrafter.drafting.proposers import RecurrentProposer
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, LookedUp
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import CHAIN

SHAPES = [
    DraftShape(width, length, min(12, width * (length - 1)), policy)
    for width in (1, 2, 4)
    for length in (2, 5)
    for policy in ("best-first", "beams")
]


def speculatively(model, drafter, prompt, count, shape, choose=greedy, verifier=None):
    verifier = verifier or verifier_of(model)
    tokens, steps = [], 0
    options = DecodingOptions(choose, count)
    proposer, planner = RecurrentProposer(drafter, verifier.target.embed), Planner(Drafted(shape))
    for produced in speculative(verifier, proposer, mx.array([prompt]), verifier.make_cache(), options, planner):
        tokens += produced.tokens
        steps += 1
    tokens = tokens[:count]
    return tokens, (len(tokens) - 1) / max(1, steps - 1)


@pytest.fixture(scope="module")
def plain_text(pair, prefixes):
    """What mlx_lm makes of prefix i in 128 tokens; each is written once."""
    return functools.cache(lambda i: by_mlx_lm(pair[0], prefixes[i], 128))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_mlx_lm(pair, prefixes, plain_text, shape):
    """If this fails, drafts change the text. (All 30 prefixes for every shape: the slow test below.)"""
    model, drafter, _ = pair
    i = SHAPES.index(shape)
    assert speculatively(model, drafter, prefixes[i], 128, shape)[0] == plain_text(i)


@pytest.mark.parametrize("count", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_acceptance_of_the_embedded_drafter(pair, prefixes, plain_text, count):
    """If this fails, drafts change the text, or the embedded drafter got worse."""
    model, drafter, _ = pair
    steps = 0.0
    for i in range(count):
        tokens, length = speculatively(model, drafter, prefixes[i], 128, DraftShape(4, 5, 12, "best-first"))
        assert tokens == plain_text(i)
        steps += 127 / length
    assert 127 * count / steps >= 2.8


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_mlx_lm_everywhere(pair, prefixes, plain_text, shape):
    """The full claim: 30 prefixes x 128 tokens for each shape, good and random drafter."""
    model, drafter, _ = pair
    for i, prefix in enumerate(prefixes):
        assert speculatively(model, drafter, prefix, 128, shape)[0] == plain_text(i)
        assert speculatively(model, random_for(model), prefix, 128, shape)[0] == plain_text(i)


def random_for(model):
    return make_drafter(vocab=4096, hidden=384)


@pytest.mark.parametrize("shape", [DraftShape(4, 5, 12), DraftShape(2, 5, 8, "beams"), DraftShape(1, 2, 1)], ids=str)
def test_a_random_drafter_changes_nothing(pair, prefixes, plain_text, shape):
    """If this fails, the text depends on how good the drafter is."""
    tokens, length = speculatively(pair[0], random_for(pair[0]), prefixes[3], 128, shape)
    assert tokens == plain_text(3)
    assert length < 1.2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temp", [0.0, 0.7, 1.5])
def test_small_models_at_any_temperature(shape, temp):
    """If this fails, the same seed gives other words with a drafter than without."""
    model, drafter = make_model(), make_drafter()
    choose = position_keyed(temp, seed=5)
    prompt = [3, 1, 4, 1, 5]
    plain = autoregressive(Target(model), mx.array([prompt]), make_prompt_cache(model), DecodingOptions(choose, 40))
    assert speculatively(model, drafter, prompt, 40, shape, choose)[0] == [p.tokens[0] for p in plain]


def test_a_drafter_that_knows_the_target_is_accepted_in_full():
    """If this fails, right drafts are thrown away: the text would be equal and slow.

    The target's own head as a drafter: a model that always repeats one token per context.
    """
    model = make_model()
    drafter = make_drafter(num_draft_layers=0, exit_dim=32)
    # The target goes t -> t + 1, whatever it has read; the drafter is made to know that.
    vocab, hidden = 97, 32
    table = mx.random.normal((vocab, hidden)) * 3
    model.model.embed_tokens.weight = table
    for layer in model.layers:
        layer.self_attn.o_proj.weight = mx.zeros_like(layer.self_attn.o_proj.weight)
        layer.mlp.down_proj.weight = mx.zeros_like(layer.mlp.down_proj.weight)
    following = mx.concatenate([mx.zeros((1, hidden)), table[:-1]])
    model.lm_head.weight = following
    drafter.rnn_w.weight = mx.eye(hidden) * 4
    drafter.rnn_u.weight = mx.zeros((hidden, hidden))
    drafter.input_proj_context.weight = mx.zeros((hidden, hidden))
    drafter.input_proj_state.weight = mx.eye(hidden)
    drafter.lm_head.weight = mx.maximum(following, 0)
    tokens, length = speculatively(model, drafter, [5], 25, DraftShape(4, 5, 12))
    assert tokens == by_mlx_lm(model, [5], 25)
    assert length > 3.5


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "4-bit", "4-bit drafter"])
def test_other_types_run(pair, prefixes, kind):
    """If this fails, half-precision or quantised pairs do not decode.

    Rows of such products may differ in the last bit between one row and many, so equality
    is only expected of the first tokens.
    """
    model, drafter = make_model(hidden=64), make_drafter(hidden=64, exit_dim=64)
    if kind == "4-bit":
        model, _ = quantize_model(model, {}, 32, 4)
    elif kind == "4-bit drafter":
        drafter.quantize(32, 4)
    else:
        model.set_dtype(getattr(mx, kind))
        drafter.set_dtype(getattr(mx, kind))
    tokens, _ = speculatively(model, drafter, [3, 1, 4, 1, 5], 32, DraftShape(4, 5, 12))
    assert len(tokens) == 32
    assert tokens[:4] == by_mlx_lm(model, [3, 1, 4, 1, 5], 4)


def test_a_chain_only_target(small_model, chains_only):
    """If this fails, targets that take only consecutive positions are drafted for wrongly."""
    verifier = verifier_of(small_model)
    assert verifier.capability == CHAIN
    tokens, _ = speculatively(small_model, make_drafter(), [1, 2, 3], 30, DraftShape(4, 5, 12), verifier=verifier)
    assert tokens == by_mlx_lm(small_model, [1, 2, 3], 30)


def test_reading_a_step_does_not_wait_for_the_next():
    """If this fails, the host waits for the step that is on its way before it builds another: no overlap at all."""
    tokens, large = mx.array([[3, 1, 4]]), mx.random.normal((800, 800))
    mx.eval(tokens, large)
    begin = time.perf_counter()
    product = large
    for _ in range(6):
        product = product @ large
    mx.async_eval(product)
    assert wait_for(tokens) == [[3, 1, 4]]
    read = time.perf_counter() - begin
    mx.eval(product)
    assert read < 0.3 * (time.perf_counter() - begin)


TREE, WIDE = Drafted(DraftShape(4, 5, 12)), Drafted(DraftShape(2, 3, 4, "beams"))

JOINED, JOINED_CHAIN = Drafted(DraftShape(4, 5, 7), True), Drafted(DraftShape(), True)

THREE, FOUND, LONG = Drafted(DraftShape()), LookedUp(4), LookedUp(11)

SCRIPTS = [  # a plain step behind another kind is asked for twice: when it is built ahead, it is not built
    [TREE, PLAIN, THREE, PLAIN, PLAIN, WIDE],
    [JOINED, FOUND, PLAIN, PLAIN, TREE, LONG, THREE, JOINED_CHAIN],
    [PLAIN, PLAIN, PLAIN, THREE, TREE, TREE],
    [FOUND, PLAIN, PLAIN, JOINED],
    [PLAIN],
]


def scripted(model, script, prompt, count, choose=greedy, drafter=None):
    """A text whose steps draft in turn what a script says, and its steps' tokens and plans."""
    verifier = verifier_of(model)
    inner = RecurrentProposer(drafter or make_drafter(), verifier.target.embed)
    proposer, planner = LookupProposer(inner, TextIndex(prompt)), Script(script)
    options, cache = DecodingOptions(choose, count), verifier.make_cache()
    steps = list(speculative(verifier, proposer, mx.array([prompt]), cache, options, planner))
    return steps, planner


@pytest.mark.parametrize(
    "window, choose, script, count",
    # Once past the 256 rows by which buffers grow; once down to one token, which no step makes.
    [
        (False, greedy, 0, 270),
        (False, position_keyed(0.9, 5, top_p=0.95), 1, 60),
        (False, greedy, 1, 60),
        (False, position_keyed(0.9, 5, top_p=0.95), 2, 60),
        (False, greedy, 3, 60),
        (False, position_keyed(0.9, 5), 4, 40),
        (False, greedy, 2, 1),
        (True, greedy, 0, 60),
        (True, greedy, 1, 60),
        (True, position_keyed(0.9, 5), 3, 60),
        (True, position_keyed(0.9, 5), 4, 40),
    ],
    ids=range(11),
)
def test_text_is_the_same_whatever_is_planned(window, choose, script, count):
    """If this fails, switching between drafting, lookup and plain steps changes the text, or loses rows."""
    windows = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24} if window else {}
    model = make_model(**windows)
    assert verifier_of(model).make_cache().can_rewind == (not window)
    for prompt in ([1, 2, 3], REPEATING):
        steps, _ = scripted(model, SCRIPTS[script], prompt, count, choose)
        tokens = [token for step in steps for token in step.tokens][:count]
        assert tokens == plainly(model, prompt, count, choose)
        assert count == 1 or {step.plan for step in steps[1:]} == set(SCRIPTS[script])
        if choose is greedy and prompt == REPEATING:
            assert tokens == by_mlx_lm(model, prompt, count)


def test_what_is_read_is_what_was_made(small_model):
    """If this fails, a planner is told of other steps than there were."""
    # A drafter that knows the text drafts what is right; here lookup does, of a text that repeats.
    prompt = by_mlx_lm(small_model, [1, 2, 3], 200)
    for script in (SCRIPTS[1], [JOINED_CHAIN], [JOINED, TREE]):
        steps, planner = scripted(small_model, script, prompt, 100)
        length = len(prompt)
        assert len(planner.steps) == len(steps) - 1 and max(len(read.tokens) for read in planner.steps) > 3
        for step, read in zip(steps[1:], planner.steps, strict=True):
            length += len(step.tokens)
            assert (read.plan, read.tokens, read.length) == (step.plan, step.tokens, length)
            assert len(read.tokens) - 1 == len(step.tokens) - 1 == sum(step.drafted)
            tree = isinstance(read.plan, Drafted) and read.plan.shape.beam_width > 1
            assert (read.path is None) == (read.parents is None) == (not tree)
            if tree:
                assert len(read.parents) == 1 + read.plan.num_draft_tokens
                assert len(read.path) == len(read.tokens) and read.path[0] == 0
                assert all(read.parents[row] == above for above, row in itertools.pairwise(read.path))
            else:
                assert len(read.tokens) - 1 <= read.plan.num_draft_tokens


def test_plain_steps_between_drafted_ones_are_plain(small_model):
    """If this fails, steps without drafts cost more than plain decoding's."""
    verifier, plain = verifier_of(small_model), []
    proposer = LookupProposer(RecurrentProposer(make_drafter(), verifier.target.embed), TextIndex([1, 2, 3]))
    planner, options = Script([THREE, FOUND, *[PLAIN] * 6]), DecodingOptions(max_tokens=60)
    cache, before = verifier.make_cache(), None
    for produced in speculative(verifier, proposer, mx.array([[1, 2, 3]]), cache, options, planner):
        # The next step is on its way already.
        if produced.plan == before == PLAIN and planner.plan() == PLAIN:
            plain.append(cache._plain)
        before = produced.plan
    assert len(plain) > 10 and all(plain)


def test_who_waits_comes_before_who_comes_back():
    """If this fails, one of two answers waits until the other has ended, or a turn within a turn for itself."""
    turns, order = Turns(), []

    def take(name):
        with turns:
            order.append(name)

    with turns, turns:
        waiting = threading.Thread(target=take, args=("who waits",))
        waiting.start()
        while turns._queue.acquire(blocking=False):  # it holds the queue once it waits
            turns._queue.release()
    take("who comes back")
    waiting.join()
    assert order == ["who waits", "who comes back"] and turns._owner is None


def test_steps_are_closed():
    """If this fails, a generation that is left early keeps its cache open."""
    closed = []

    def steps():
        try:
            yield from range(3)
        finally:
            closed.append(True)

    assert list(in_turns(steps())) == [0, 1, 2] and closed == [True]
    left = in_turns(steps())
    next(left)
    left.close()
    assert closed == [True, True]
