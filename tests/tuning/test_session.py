"""What is known of a pair: measured once, kept, and who proposes and plans because of it."""

import json
from typing import Any

import mlx.core as mx
import pytest
from support import REPEATING, make_drafter, make_model, plainly
from support.costs import made_up

from mlx_redrafter.decoding.loop import speculative
from mlx_redrafter.decoding.planner import Planner, StepRead
from mlx_redrafter.decoding.sampling import greedy
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.lookup import LookupProposer, TextIndex
from mlx_redrafter.drafting.proposers import RecurrentProposer
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, LookedUp
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.verification import CHAIN
from mlx_redrafter.tuning import session, store
from mlx_redrafter.tuning.pair_key import key_of, weights_digest
from mlx_redrafter.tuning.session import SHAPES, drafting_for, session_for
from mlx_redrafter.tuning.shape_controller import Controller

COSTS = made_up(lambda rows: 1 + 0.05 * (rows - 1))
TREE = DraftShape(4, 5, 7)
WRONG = StepRead(Drafted(DraftShape()), [1], 20)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Files of this test alone, and costs that are not measured."""
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "tuning"))
    monkeypatch.setattr(session, "_measured", {})
    monkeypatch.setattr(session, "measure", lambda *_: COSTS)
    return tmp_path / "tuning"


def test_pairs_are_told_apart():
    def key(model, drafter):
        return key_of(verifier_of(model), drafter)

    usual = key(make_model(), make_drafter())
    assert usual == key(make_model(seed=5), make_drafter(seed=5))  # weights do not matter to the time
    half = make_model()
    half.set_dtype(mx.float16)
    others = [key(half, make_drafter()), key(make_model(), make_drafter(exit_dim=16)), key(make_model(), None)]
    assert len({str(k) for k in (usual, *others)}) == 4
    assert weights_digest(make_drafter()) == weights_digest(make_drafter()) != weights_digest(make_drafter(seed=1))
    wide = make_model()
    for layer in wide.layers:
        layer.self_attn.n_heads //= 2
    assert key(wide, make_drafter()) != usual


@pytest.mark.parametrize("drafting", [True, False])
def test_a_pair_is_measured_once(small_model, monkeypatch, drafting):
    """If this fails, every text begins with two seconds of measuring."""
    verifier, drafter = verifier_of(small_model), make_drafter() if drafting else None
    first = session_for(verifier, drafter)
    assert first.measured_now and first.costs is COSTS
    monkeypatch.setattr(session, "measure", lambda *_: pytest.fail("measured again"))
    assert session_for(verifier, drafter) is first
    again = make_drafter(seed=3) if drafting else None
    assert session_for(verifier_of(make_model(seed=4)), again).costs == COSTS
    monkeypatch.setattr(session, "_measured", {})  # another process
    found = session_for(verifier_of(make_model(seed=5)), again and make_drafter(seed=4))
    assert found.costs == COSTS and not found.measured_now


def test_where_nothing_is_kept_a_process_measures_once(small_model, monkeypatch):
    monkeypatch.setenv(store.VARIABLE, "off")
    session_for(verifier_of(small_model), make_drafter())
    monkeypatch.setattr(session, "measure", lambda *_: pytest.fail("measured again"))
    session_for(verifier_of(small_model), make_drafter(seed=1))


def test_what_was_learnt_is_kept(monkeypatch):
    """If this fails, every process finds out anew that a drafter is of no use."""
    verifier, drafter = verifier_of(make_model()), make_drafter()
    found = session_for(verifier, drafter)
    for _ in range(40):
        found.memory.acceptance.learn(WRONG)
    found.save()
    same, other = (session_for(verifier, make_drafter(seed=seed)).memory.acceptance for seed in (0, 1))
    assert same.steps == 40 and same.shares()[0][0] < 0.1
    assert other.steps == 0 and other.shares()[0][0] > 0.5
    fresh = session_for(verifier, drafter, fresh=True)
    assert fresh is not found and fresh.measured_now and fresh.memory.acceptance.steps == 0


def test_drafters_of_one_kind_are_kept_side_by_side():
    """If this fails, one drafter's text throws away what was learnt of another, or the file grows without end."""
    verifier = verifier_of(make_model())
    drafters = [make_drafter(seed=seed) for seed in range(18)]
    for drafter in drafters:
        found = session_for(verifier, drafter)
        for _ in range(40):
            found.memory.acceptance.learn(WRONG)
        found.save()
    kept = store.read(key_of(verifier, drafters[0]))["drafters"]
    assert list(kept) == [weights_digest(drafter) for drafter in drafters[2:]]
    found.save()  # nothing more was learnt
    assert store.read(key_of(verifier, drafters[0]))["drafters"] == kept


@pytest.mark.parametrize(
    "damage",
    [
        {"costs": {}},
        {"costs": {"verify": {"128": {"1": -1}}, "plain": {"128": 1}, "draft": {}}},
        {"costs": None},
        {"drafters": []},
        {"drafters": None},
        {"drafters": "all right"},
        {"drafters": "damaged"},
    ],
    ids=str,
)
def test_damaged_files_count_as_none(damage, monkeypatch):
    """If this fails, a file that a crash left breaks every text from then on."""
    verifier, drafter = verifier_of(make_model()), make_drafter()
    key, weights = key_of(verifier, drafter), weights_digest(drafter)
    if damage.get("drafters") == "damaged":
        damage = {"drafters": {weights: {"steps": 3, "first": [[1, 0]], "later": []}}}
    store.write(key, {"costs": COSTS.to_dict(), "drafters": {}} | damage)
    found = session_for(verifier, drafter)
    assert found.costs == COSTS and found.memory.acceptance.steps == 0
    for _ in range(40):
        found.memory.acceptance.learn(WRONG)
    found.save()
    monkeypatch.setattr(session, "_measured", {})
    assert session_for(verifier, make_drafter()).memory.acceptance.steps == 40


def test_shapes_that_a_pair_can_draft():
    """If this fails, a shape is chosen that no step can draft."""
    for shape in SHAPES:
        shape.check(97)
    verifier = verifier_of(make_model())

    def shapes(drafter):
        found = session_for(verifier, drafter).memory.arms
        assert found[0].plan == PLAIN
        return [arm.plan.shape for arm in found[1:]]

    assert shapes(make_drafter()) == list(SHAPES) and shapes(None or make_drafter(seed=1)) == list(SHAPES)
    assert [arm.plan for arm in session_for(verifier, None).memory.arms] == [PLAIN]
    verifier.capability = CHAIN
    assert {shape.beam_width for shape in shapes(make_drafter(seed=2))} == {1}


def test_who_proposes_and_who_plans(small_model):
    """If this fails, a shape or a lookup that was asked for is not what is drafted."""
    verifier, drafter = verifier_of(small_model), make_drafter()

    def plans(drafter, shape, lookup, text=REPEATING):
        proposer, planner, known = drafting_for(verifier, drafter, shape, lookup, text, greedy)
        return type(proposer), planner.plan(), known is not None

    assert plans(drafter, TREE, "off") == (RecurrentProposer, Drafted(TREE), False)
    assert plans(drafter, TREE, "on")[:2] == (LookupProposer, Drafted(TREE, with_lookup=True))
    assert plans(None, DraftShape(), "on")[:2] == (LookupProposer, LookedUp(3))
    assert plans(None, DraftShape(), "on", list(range(20)))[:2] == (LookupProposer, PLAIN)
    kind, plan, known = plans(drafter, None, "off")
    assert kind is RecurrentProposer and known and plan == Controller(session_for(verifier, drafter).memory).plan()
    kind, plan, _ = plans(drafter, TREE, "auto", list(range(20)))
    assert kind is LookupProposer and plan == Drafted(TREE)
    assert isinstance(drafting_for(verifier, drafter, TREE, "off", [], greedy)[1], Planner)


def test_structured_texts_teach_apart(small_model):
    """If this fails, free texts are drafted as though a grammar pruned them, or a grammar's as though none did."""
    verifier, drafter = verifier_of(small_model), make_drafter()
    for shape in (None, TREE):
        planners: list[Any] = [
            drafting_for(verifier, drafter, shape, "auto", [], greedy, grammar)[1] for grammar in (False, True, True)
        ]
        free, structured, again = planners
        assert structured.memory is again.memory and free.memory.lookup is not again.memory.lookup
        step = StepRead(Drafted(shape or DraftShape()), [1], 20)
        before = free.memory.acceptance.steps, again.memory.acceptance.steps
        structured.learn(step)
        assert (free.memory.acceptance.steps, again.memory.acceptance.steps) == (before[0], before[1] + 1)
        free.learn(step)
        assert (free.memory.acceptance.steps, again.memory.acceptance.steps) == (before[0] + 1, before[1] + 1)


def decoded(verifier, drafter, shape, lookup, text, count=60):
    proposer, planner, _ = drafting_for(verifier, drafter, shape, lookup, text, greedy)
    steps = speculative(
        verifier, proposer, mx.array([text]), verifier.make_cache(), DecodingOptions(max_tokens=count), planner
    )
    tokens, plans = [], []
    for produced in steps:
        tokens += produced.tokens
        plans += [] if produced.from_prompt else [produced.plan]
    return tokens[:count], plans


def test_on_without_a_drafter_takes_plain_steps_where_nothing_is_found(small_model):
    """If this fails, steps check rows of a lookup that found nothing."""
    verifier = verifier_of(small_model)
    text = list(range(20))
    tokens, plans = decoded(verifier, None, DraftShape(), "on", text)
    assert tokens == plainly(small_model, text, 60)
    # Each step is planned one step before it, of the text known then; one behind plain steps is settled first.
    index, found = TextIndex([*text, tokens[0]]), []
    for token in tokens[1:]:
        found.append(bool(index.continuation(1)))
        index.extend([token])
    assert plans[0] == PLAIN and set(plans) <= {PLAIN, LookedUp(3)}
    if not any(found):
        assert set(plans) == {PLAIN}
    repeated, plans = decoded(verifier, None, DraftShape(), "on", REPEATING)
    assert repeated == plainly(small_model, REPEATING, 60) and LookedUp(3) in plans


@pytest.mark.parametrize("shape", [DraftShape(), TREE], ids=str)
def test_a_fixed_shape_with_lookup_where_it_pays(small_model, shape):
    """If this fails, auto lookup changes the text or the shape that was asked for, or teaches another pair's memory."""
    verifier, drafter = verifier_of(small_model), make_drafter()
    text = plainly(small_model, REPEATING, 150)
    text = (REPEATING + text)[-60:] * 2
    tokens, plans = decoded(verifier, drafter, shape, "auto", text)
    assert tokens == plainly(small_model, text, 60)
    assert any(isinstance(plan, LookedUp) for plan in plans)
    assert {plan.shape for plan in plans if isinstance(plan, Drafted)} <= {shape} and PLAIN not in plans
    tokens, plans = decoded(verifier, drafter, shape, "auto", [5, 6, 7])
    assert tokens == plainly(small_model, [5, 6, 7], 60) and Drafted(shape) in plans and PLAIN not in plans


def test_costs_reach_the_file(folder):
    verifier, drafter = verifier_of(make_model()), make_drafter()
    session_for(verifier, drafter)
    [file] = folder.iterdir()
    assert json.loads(file.read_text())["costs"]["plain"] == {"128": 1.0}
