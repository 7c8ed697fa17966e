"""The doctor's stages, compared between two CPU streams, one of which is broken on purpose."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from support import make_drafter, make_model

from mlx_redrafter.decoding import sampling
from mlx_redrafter.doctor import fixed_stages as fixed
from mlx_redrafter.doctor.beam_stage import judge_beams
from mlx_redrafter.doctor.checks import FAILED, NOT_MADE, OK
from mlx_redrafter.doctor.comparison import Places, Stage, compare, run_in
from mlx_redrafter.doctor.pair_stages import every_way, inputs, pair_stages, plain_stage, tolerances
from mlx_redrafter.drafting import beam_search
from mlx_redrafter.drafting.medusa import MedusaConfig, MedusaHeads
from mlx_redrafter.drafting.redrafter import RecurrentDrafter
from mlx_redrafter.target.cache.kv_cache import KVCache
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import probe

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38]


@pytest.fixture(scope="module")
def places():
    return Places(mx.new_stream(mx.cpu), mx.new_stream(mx.cpu))


def on(place):
    return mx.default_stream(mx.default_device()) == place


def stages_of(places, drafter):
    target = Target(make_model())
    given = inputs(target, PROMPT, places.reference, drafter.context_layers)
    ways = every_way(probe(target))
    return [plain_stage(target, given), *pair_stages(target, drafter, given, ways), *fixed.fixed_stages()]


def outcome(places, drafter):
    return {stage.name: compare(stage, places, 1e-4) for stage in stages_of(places, drafter)}


@pytest.mark.parametrize(
    "changes", [{}, {"rnn": False}, {"draft_vocab_size": 40, "context_layers": (1, 2)}], ids=["", "sums", "vocabulary"]
)
def test_all_is_well(places, changes):
    found = outcome(places, make_drafter(**changes))
    assert {check.status for check in found.values()} == {OK}, found
    assert set(found) == {
        "plain pass (mlx-lm's own code)", "drafter", "beam search", "capability", "verification of a tree",
        "verification of a tree, rows split", "verification of a chain", "commit",
        "tree building", "sampling", "acceptance",
    }  # fmt: skip


def test_medusa_heads_have_no_beams(places):
    heads = MedusaHeads(MedusaConfig(vocab_size=97, hidden_size=32, medusa_num_heads=2, medusa_num_layers=1))
    found = outcome(places, heads)
    assert {check.status for check in found.values()} == {OK} and "beam search" not in found


def broken_logits(places, patch):
    whole = RecurrentDrafter.logits
    off = lambda *a: whole(*a) + (mx.arange(97) * 0.05 if on(places.tested) else 0)  # noqa: E731
    patch.setattr(RecurrentDrafter, "logits", off)


def broken_top(places, patch):
    whole = beam_search.top

    def top(scores, count):
        best, values = whole(scores, count)
        return (best + 1) % scores.shape[1] if on(places.tested) else best, values

    patch.setattr(beam_search, "top", top)


def broken_ranks(places, patch):
    whole = beam_search.ranks
    patch.setattr(beam_search, "ranks", lambda keys: whole(-keys if on(places.tested) else keys))


def broken_positions(places, patch):
    whole = KVCache.reading

    def reading(self, tree, *more):
        moved = dataclasses.replace(tree, depths=tree.depths + 1) if on(places.tested) else tree
        return whole(self, moved, *more)

    patch.setattr(KVCache, "reading", reading)


def broken_commit(places, patch):
    whole = KVCache.commit
    patch.setattr(KVCache, "commit", lambda self, path, *a: whole(self, None if on(places.tested) else path, *a))


def broken_bits(places, patch):
    whole = mx.random.randint
    off = lambda *a, key, **k: whole(*a, key=key + 1 if on(places.tested) else key, **k)  # noqa: E731
    patch.setattr(mx.random, "randint", off)


def broken_argmax(places, patch):
    whole = sampling.greedy
    patch.setattr(fixed, "greedy", lambda logits, p: whole(-logits if on(places.tested) else logits, p))


def broken_acceptance(places, patch):
    whole = fixed.accept

    def accept(tree, choices):
        found = whole(tree, choices)
        found.count = found.count + (1 if on(places.tested) else 0)
        return found

    patch.setattr(fixed, "accept", accept)


@pytest.mark.parametrize(
    "break_it, names",
    [
        (broken_logits, {"drafter", "beam search"}),
        (broken_top, {"beam search"}),
        (broken_ranks, {"tree building"}),
        (
            broken_positions,
            {"verification of a tree", "verification of a tree, rows split", "capability", "commit"},
        ),
        (broken_commit, {"commit", "capability"}),
        (broken_bits, {"sampling"}),
        (broken_argmax, {"sampling"}),
        (broken_acceptance, {"acceptance"}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_broken_in_one_place_is_named(places, monkeypatch, break_it, names):
    """If this fails, the doctor finds a device healthy that drafts, verifies or samples wrongly."""
    drafter = make_drafter()
    break_it(places, monkeypatch)
    found = outcome(places, drafter)
    assert {name for name, check in found.items() if check.status == FAILED} == names
    assert all(check.advice for check in found.values() if check.status == FAILED)


def stage(places, tested, reference):
    return Stage("made up", lambda: {"x": tested() if on(places.tested) else reference()})


@pytest.mark.parametrize(
    "tested, reference, words",
    [
        (lambda: mx.array([1.0, 2.1]), lambda: mx.array([1.0, 2.0]), "x: apart by 0.05"),
        (lambda: mx.array([1.0, mx.nan]), lambda: mx.array([1.0, 2.0]), "x: apart by inf"),
        (lambda: mx.array([1.0, 2.0]), lambda: mx.array([-mx.inf, 2.0]), "x: apart by inf"),
        (lambda: mx.array([1, 3]), lambda: mx.array([1, 2]), "x: 1 of 2 differ"),
        (lambda: mx.array([True]), lambda: mx.array([False]), "x: 1 of 1 differ"),
        (lambda: mx.zeros((2,)), lambda: mx.zeros((3,)), "x: shape (2,), expected (3,)"),
        (lambda: mx.zeros((2,)).reshape(3), lambda: mx.zeros((3,)), "does not run: ValueError"),
    ],
    ids=range(7),
)
def test_every_kind_of_difference(places, tested, reference, words):
    check = compare(stage(places, tested, reference), places, 1e-3)
    assert check.status == FAILED and check.detail.startswith(words)


@pytest.mark.parametrize("value", [1e-4, mx.nan, mx.inf, -mx.inf])
def test_what_is_no_difference(places, value):
    same = stage(places, lambda: mx.array([1.0001, value], mx.bfloat16), lambda: mx.array([1.0, value], mx.bfloat16))
    assert compare(same, places, 1e-3).status == OK


def test_what_cannot_be_compared(places):
    """A reference that does not run says nothing against the device; without a GPU nothing is compared."""
    check = compare(stage(places, lambda: mx.zeros(1), lambda: mx.zeros(2).reshape(3)), places, 1e-3)
    assert check.status == NOT_MADE and "the CPU cannot run it" in check.detail
    assert compare(stage(places, lambda: mx.zeros(1), lambda: mx.ones(1)), None, 1e-3).status == NOT_MADE
    assert Places.here() is None or mx.is_available(mx.Device(mx.gpu))


def test_compiling_comes_back(places, monkeypatch):
    """The CPU's side runs uncompiled; if that stayed so, everything after it would be slower."""
    switched = []
    monkeypatch.setattr(mx, "enable_compile", lambda: switched.append("on"))
    monkeypatch.setattr(mx, "disable_compile", lambda: switched.append("off"))
    one = stage(places, lambda: mx.zeros(1), lambda: mx.zeros(1))
    monkeypatch.delenv("MLX_DISABLE_COMPILE", raising=False)
    run_in(places.reference, one, compiled=False)
    run_in(places.tested, one)
    assert switched == ["off", "on"]
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    run_in(places.reference, one, compiled=False)
    assert switched == ["off", "on", "off"]


def test_ties_are_no_failure():
    """Two equally probable tokens may change places, and what grows from them; wrong claims may not pass as that."""
    expected = {"tokens": np.array([[[5, 6], [7, 8]]]), "origins": np.array([[[0, 0], [0, 1]]])}
    expected["log_probs"] = np.array([[[-1.0, -1.0], [-2.0, -3.0]]])
    tie = {"tokens": np.array([[[6, 5], [9, 8]]]), "origins": np.array([[[0, 0], [1, 1]]])}
    tie["log_probs"] = np.array([[[-1.0, -1.0], [-2.0, -4.0]]])
    assert judge_beams(expected, expected, expected["log_probs"], 1e-3) == ""
    assert judge_beams(tie, expected, tie["log_probs"], 1e-3) == ""
    worse = tie | {"log_probs": np.array([[[-1.0, -1.5], [-2.0, -4.0]]])}
    assert "not the most probable" in judge_beams(worse, expected, worse["log_probs"], 1e-3)
    assert "not those of the tokens" in judge_beams(tie, expected, expected["log_probs"], 1e-3)
    assert "out of range" in judge_beams(tie, expected, None, 1e-3)


def test_tolerances_by_type(small_model):
    exact, rough = tolerances(small_model, Target(small_model)), None
    small_model.set_dtype(mx.bfloat16)
    rough = tolerances(small_model, Target(small_model))
    assert exact[0] < rough[0] and exact[1] < rough[1]
