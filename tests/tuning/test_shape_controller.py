"""Steering while a text is written, on a made-up device whose clock the tests hold."""

import functools

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from mlx_redrafter.decoding.steering import Outcome
from mlx_redrafter.tuning.calibration import Calibration
from mlx_redrafter.tuning.expectation import Expectation
from support import make_drafter, make_model
from support.costs import made_up, shares
from support.texts import by_mlx_lm

from mlx_redrafter import stream_generate
from mlx_redrafter.decoding.loop import autoregressive, speculative
from mlx_redrafter.decoding.options import DecodingOptions
from mlx_redrafter.decoding.sampling import greedy, position_keyed
from mlx_redrafter.drafting.lookup import LookupProposer
from mlx_redrafter.drafting.proposers import RecurrentProposer
from mlx_redrafter.drafting.shape import DraftShape, LookupChain
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.tuning.session import best_shape, few_shapes
from mlx_redrafter.tuning.shape_controller import Adaptation, Memory
from mlx_redrafter.tuning.step_costs import measure

COSTS = made_up(lambda rows: 1 + 0.05 * (rows - 1), lambda w, n: (0.05 + 0.005 * w) * (n - 1))


class Device:
    """Runs steps whose first drafts are right with a probability, in the time that `costs` says."""

    def __init__(self, memory, costs=COSTS, seed=0):
        self.memory, self.costs, self.now = memory, costs, 0.0
        self.rng = np.random.default_rng(seed)
        self.shapes: list[DraftShape | None] = []

    def outcome(self, shape, quality):
        if shape is None:
            return Outcome(None, 0, [], [])
        depth, ranks = shape.beam_length - 1, []
        children = 1 if shape.beam_width == 1 else 2
        while len(ranks) < depth:
            draw = self.rng.random()
            if draw < quality:
                ranks.append(0)
            elif children > 1 and draw < quality + (1 - quality) * 0.4 * quality / 0.65:
                ranks.append(1)
            else:
                break
        return Outcome(shape, len(ranks), [children] * min(len(ranks) + 1, depth), ranks)

    def write(self, tokens, quality, pause=lambda: 0.0):
        """One text; returns its seconds. The next step is always chosen before the last is known."""
        steering, made, begin = Adaptation(self.memory, lambda: self.now), 0, self.now
        steering.begin()
        following = steering.shape()
        while made < tokens:
            shape, following = following, steering.shape()
            self.shapes.append(shape)
            outcome = self.outcome(shape, quality)
            self.now += self.costs.step_seconds(shape, 128) * self.rng.uniform(0.95, 1.1) + pause()
            made += 1 + outcome.accepted
            steering.learn(outcome, 128 + made)
        return (self.now - begin) * tokens / made

    def speed_of(self, shape, quality, tokens=20000):
        """Tokens per second of a fixed shape."""
        steps, made = 0, 0
        while made < tokens:
            made, steps = made + 1 + self.outcome(shape, quality).accepted, steps + 1
        return made / steps / self.costs.step_seconds(shape, 128) / 1.025


def new_memory(costs=COSTS):
    return Memory(costs, Calibration(), few_shapes(costs, Calibration()))


@pytest.mark.parametrize("seed", range(4))
def test_a_useless_drafter_costs_little(seed):
    """If this fails, auto is slower than decoding without the drafter by more than it may be."""
    device = Device(new_memory(), seed=seed)
    assert device.memory.current is not None
    plain = 1.025
    seconds = [device.write(128, 0.0) / (128 * plain) for _ in range(20)]
    assert seconds[0] < 1.08  # finding out
    assert np.mean(seconds) < 1.025 and np.mean(seconds[4:]) < 1.02
    assert any(device.shapes[-1500:])  # it still looks now and then


@pytest.mark.parametrize("quality", [0.4, 0.7, 0.9])
def test_close_to_the_best_fixed_shape(quality):
    device = Device(new_memory())
    device.write(1000, quality)
    speed = 4000 / device.write(4000, quality)
    best = max(device.speed_of(shape, quality) for shape in device.memory.shapes if shape is not None)
    assert speed > 0.95 * best


def test_goes_plain_when_drafts_fail_and_comes_back():
    device = Device(new_memory())
    device.write(500, 0.75)
    assert device.memory.current is not None
    device.write(300, 0.0)
    assert device.memory.current is None
    device.write(1500, 0.75)
    assert device.memory.current is not None
    assert 1000 / device.write(1000, 0.75) > 1.5


def test_believes_the_clock_more_than_the_table():
    """Drafted steps take three times what was measured beforehand, as when another program holds the cores."""
    true = made_up(lambda rows: 1 + 0.05 * (rows - 1), lambda w, n: 3.0, plain=1.0)
    device = Device(new_memory(), true)
    device.write(1500, 0.7)
    assert device.memory.current is None
    # And the other way round: nothing should pay, but it does.
    device = Device(new_memory(made_up(lambda rows: float(rows))))
    assert device.memory.current is None
    device.write(2000, 0.8)
    assert device.memory.current is not None


def test_pauses_of_the_reader_are_no_slow_steps():
    device = Device(new_memory())
    device.write(400, 0.7)
    before = device.memory.seconds(device.memory.current, 128)
    device.write(800, 0.7, pause=lambda: 50.0 if device.rng.random() < 0.2 else 0.0)
    assert device.memory.current is not None
    assert device.memory.seconds(device.memory.current, 128) < 1.2 * before


def test_few_changes_of_shape():
    """A drafter of one quality is drafted for with one shape, but for trials."""
    device = Device(new_memory())
    device.write(6000, 0.7)
    changes = sum(a != b for a, b in zip(device.shapes, device.shapes[1:]))
    assert changes < len(device.shapes) / 25


class Script:
    """Another shape at every step."""

    def __init__(self, shapes):
        self.shapes, self.at, self.outcomes = shapes, 0, []

    def begin(self):
        pass

    def shape(self):
        return self.shapes[self.at % len(self.shapes)]

    def learn(self, outcome, length):
        self.outcomes.append(outcome)
        self.at += 1


TREE, CHAIN, WIDE = DraftShape(4, 5, 12), DraftShape(1, 4, 3), DraftShape(2, 3, 4, "beams")
KEYED = position_keyed(0.9, 5, top_p=0.95)
SCRIPTS = [[TREE, None, CHAIN, None, None, WIDE], [None, TREE], [None, None, None, CHAIN, TREE, TREE], [None]]


@pytest.mark.parametrize(
    "choose, script, count",
    # Once past the 256 rows by which buffers grow; once down to one token, which no step makes.
    [
        (greedy, SCRIPTS[0], 270),
        (KEYED, SCRIPTS[2], 60),
        (greedy, SCRIPTS[1], 60),
        (KEYED, SCRIPTS[3], 40),
        (greedy, SCRIPTS[1], 1),
    ],
    ids=range(5),
)
def test_text_is_the_same_whatever_is_switched(small_model, choose, script, count):
    """If this fails, switching between drafting and plain steps changes the text, or loses rows of the cache."""
    verifier, prompt = verifier_of(small_model), [1, 2, 3]
    options = DecodingOptions(choose, max_tokens=count)
    plain = autoregressive(verifier.target, mx.array([prompt]), make_prompt_cache(small_model), options)
    expected = [produced.tokens[0] for produced in plain]
    proposer = RecurrentProposer(make_drafter(), verifier.target.embed, None)
    steering, tokens, shapes = Script(script), [], []
    cache = verifier.make_cache()
    for produced in speculative(verifier, proposer, mx.array([prompt]), cache, options, steering):
        tokens += produced.tokens
        shapes.append(produced.shape)
    assert tokens[:count] == expected
    assert count == 1 or set(shapes[1:]) == set(script)
    assert len(steering.outcomes) == len(shapes) - 1
    for produced_shape, outcome in zip(shapes[1:], steering.outcomes):
        assert outcome.shape == produced_shape and (outcome.shape is not None or outcome.accepted == 0)
    if choose is greedy:
        assert expected == by_mlx_lm(small_model, prompt, count)


def test_outcomes_are_those_of_the_steps(small_model):
    """If this fails, calibration learns from other trees than were checked."""
    verifier = verifier_of(small_model)
    # A drafter that knows the text drafts what is right; here lookup does, of a text that repeats.
    proposer = LookupProposer(RecurrentProposer(make_drafter(), verifier.target.embed, CHAIN), CHAIN, "on")
    steering, steps = Script([CHAIN]), []
    options = DecodingOptions(max_tokens=120)
    prompt = mx.array([by_mlx_lm(small_model, [1, 2, 3], 200)])
    for produced in speculative(verifier, proposer, prompt, verifier.make_cache(), options, steering):
        steps.append(produced.tokens)
    assert [outcome.accepted for outcome in steering.outcomes] == [len(tokens) - 1 for tokens in steps[1:]]
    assert all(o.children == [1, 1, 1] and o.ranks == [0] * o.accepted for o in steering.outcomes)


@pytest.mark.parametrize("lookup", ["auto", "on"])
def test_lookup_and_switching(small_model, lookup):
    verifier, prompt = verifier_of(small_model), [3, 14, 15, 92, 65] * 6
    proposer = LookupProposer(RecurrentProposer(make_drafter(), verifier.target.embed, None), None, lookup)
    tokens = []
    for produced in speculative(
        verifier,
        proposer,
        mx.array([prompt]),
        verifier.make_cache(),
        DecodingOptions(max_tokens=120),
        Script(SCRIPTS[0]),
    ):
        tokens += produced.tokens
    assert tokens[:120] == by_mlx_lm(small_model, prompt, 120)


def times(memory):
    return [memory.seconds(shape, 128) for shape in memory.shapes]


def test_lookups_tell_nothing_of_the_drafter():
    """If this fails, a text that repeats itself makes the drafter look better, or its steps slower."""
    device = Device(new_memory())
    device.write(500, 0.7)
    memory = device.memory
    steering = Adaptation(memory, lambda: device.now)
    steering.begin()
    before, usual = (memory.calibration.to_dict(), memory.current, memory.spent), times(memory)
    for _ in range(40):
        device.now += 7.0
        steering.learn(Outcome(LookupChain.of(7), 7, [1] * 7, [0] * 7), 128)
    assert (memory.calibration.to_dict(), memory.current, memory.spent) == before
    assert times(memory) == usual
    # Their own time is learnt, whatever their length.
    expected = COSTS.step_seconds(LookupChain.of(7), 128)
    assert memory.seconds(LookupChain.of(7), 128) == pytest.approx(7.0)
    assert memory.seconds(LookupChain.of(3), 128) == pytest.approx(
        7.0 / expected * COSTS.step_seconds(LookupChain.of(3), 128)
    )


def test_auto_says_what_it_did(pair, prefixes):
    """If this fails, a user cannot tell what was chosen, or the text is another one."""
    model, drafter, tokenizer = pair
    stream = functools.partial(stream_generate, model, tokenizer, prefixes[3], max_tokens=48)
    expected = [response.token for response in stream()]
    found = list(stream(drafter))
    assert [response.token for response in found] == expected
    last = found[-1]
    assert last.method == "redrafter" and 0 <= last.plain_share <= 1
    assert (last.shape is None) == (last.plain_share == 1)
    fixed = list(stream(drafter, shape=TREE))[-1]
    assert fixed.shape == TREE and fixed.plain_share == 0


def test_a_random_drafter_ends_in_plain_decoding():
    """The same through the real loop, its clock aside: nothing is accepted, so plain steps it is."""
    model, drafter = make_model(), make_drafter()
    memory, tokens = new_memory(), []
    verifier = verifier_of(model)
    proposer = RecurrentProposer(drafter, verifier.target.embed, None)
    steering = Adaptation(memory, lambda: 0.0)
    memory.note_time = lambda *_: None  # only acceptance counts
    options = DecodingOptions(max_tokens=100)
    for produced in speculative(verifier, proposer, mx.array([[1, 2, 3]]), verifier.make_cache(), options, steering):
        tokens += produced.tokens
    assert tokens[:100] == by_mlx_lm(model, [1, 2, 3], 100)
    assert memory.current is None


def test_the_choice_of_the_simulated_device_is_the_formula():
    """The made-up device and the expectation agree on chains; else the tests above test nothing."""
    device, expectation = Device(new_memory()), Expectation(*shares(0.7))
    speed = device.speed_of(CHAIN, 0.7)
    assert speed == pytest.approx((1 + expectation.accepted(CHAIN)) / COSTS.step_seconds(CHAIN, 128) / 1.025, rel=0.03)
    assert best_shape(COSTS, *shares(0.7))[1] > speed * 1.0


def test_a_target_with_windows_switches_too():
    """If this fails, plain steps behind a window lose rows, or its costs cannot be measured."""
    mx.random.seed(3)
    args = llama.ModelArgs(
        model_type="llama", hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=97, max_position_embeddings=512,
        layer_types=["sliding_attention", "full_attention"], sliding_window=24,
    )  # fmt: skip
    verifier = verifier_of(llama.Model(args))
    assert verifier.capability == "tree" and not verifier.make_cache().can_rewind
    assert list(measure(verifier, make_drafter(), seconds=0).verify) == [128]
    proposer, tokens = RecurrentProposer(make_drafter(), verifier.target.embed, None), []
    options, prompt = DecodingOptions(max_tokens=50), mx.array([[1, 2, 3]])
    for produced in speculative(verifier, proposer, prompt, verifier.make_cache(), options, Script(SCRIPTS[0])):
        tokens += produced.tokens
    assert tokens[:50] == by_mlx_lm(verifier.target.model, [1, 2, 3], 50)
