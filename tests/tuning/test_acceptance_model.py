"""How many drafts of a shape, or tokens of a lookup, are expected to be right, from those that were."""

import itertools
import json

import pytest
from support.lookups import AGAIN, Rates, decode, started

from mlx_redrafter.decoding.planner import StepRead
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape
from mlx_redrafter.tuning.acceptance_model import (
    DEEPEST,
    DEPTHS,
    FIRST,
    LOOKUP_ASSUMED,
    NEXT,
    AcceptanceModel,
    LookupMemory,
    RunningShare,
)

CHAIN = Drafted(DraftShape())


def chain(accepted, plan=CHAIN):
    """A step of a chain of which so many drafts were right."""
    return StepRead(plan, [1] * (accepted + 1), 20)


def tree(path, parents):
    return StepRead(Drafted(DraftShape(2, 3, 4)), [1] * len(path), 20, path, parents)


def test_counts_only_what_was_there_to_check():
    """If this fails, the end of a chain counts as a wrong draft, or siblings as first choices."""
    model = AcceptanceModel()
    for _ in range(400):
        model.learn(chain(3))
        model.learn(chain(1))
        # Right: the second child of the root, then nothing below it.
        model.learn(tree([0, 2], [0, 0, 0, 1, 1]))
    first, later = model.shares()
    assert first[0] == pytest.approx(2 / 3, abs=0.02)  # right, right, wrong
    assert first[1] == pytest.approx(1 / 2, abs=0.02)  # right, wrong, not there
    assert first[2] == pytest.approx(1, abs=0.05) and first[3] == pytest.approx(1, abs=0.05)
    assert later[0] == pytest.approx(1, abs=0.05)
    assert model.steps == 1200
    assert model.first[3].tries == 0 and model.later[1].tries == 0


def test_a_tree_is_read_by_its_rows():
    """If this fails, a child's rank is taken from its row, or the children of another node count."""
    #        0
    #      1   2       rows in order of probability: 3 and 5 hang on 1, 4 on 2
    parents = [0, 0, 0, 1, 2, 1]
    model = AcceptanceModel()
    model.learn(tree([0, 1, 5], parents))
    tried = [(share.hits, share.tries) for share in model.first[:3]]
    assert tried == [(1, 1), (0, 1), (0, 0)] and (model.later[0].hits, model.later[0].tries) == (1, 1)
    model = AcceptanceModel()
    model.learn(tree([0], parents))  # both children of the root were wrong
    assert (model.first[0].hits, model.first[0].tries) == (0, 1)
    assert (model.later[0].hits, model.later[0].tries) == (0, 1) and model.later[1].tries == 0


def test_a_chain_that_was_shorter_than_its_shape():
    """If this fails, a target that takes chains only, or four Medusa heads, make deep drafts look wrong."""
    model = AcceptanceModel()
    for plan in (Drafted(DraftShape(4, 5, 12)), Drafted(DraftShape(1, 8, 7))):
        for _ in range(100):
            model.learn(StepRead(plan, [1] * 5, 20, most=4))
    assert all(share.tries == 0 for share in model.first[4:]) and model.shares()[0][3] > 0.95


def test_deep_chains():
    """If this fails, a chain longer than the depths that are told apart cannot be learnt from."""
    model = AcceptanceModel()
    model.learn(chain(14, Drafted(DraftShape(1, 16, 15))))
    assert [share.tries for share in model.first] == [1] * DEPTHS
    assert model.expected(DraftShape(1, 31, 30)) > model.expected(DraftShape(1, 16, 15))


def test_what_training_measured_is_assumed_first():
    """If this fails, what is assumed of depths that nobody measured is better than of those above."""
    assumed = AcceptanceModel().shares()
    assert assumed[0] == pytest.approx([FIRST] * DEPTHS) and assumed[1] == pytest.approx(NEXT)
    first, later = AcceptanceModel([0.5, 0.3]).shares()
    assert first == pytest.approx([0.5] + [0.3] * (DEPTHS - 1))
    assert later == pytest.approx([0.5 / FIRST * share for share in NEXT])  # a poor drafter has no good second child


def test_expected_lengths():
    model = AcceptanceModel([0.8, 0.5, 0.5])
    assert model.shares()[1][:2] == pytest.approx([0.4, 0.3])
    assert model.expected(DraftShape(1, 4, 3)) == pytest.approx(0.8 + 0.4 + 0.2)
    assert model.expected(DraftShape(3, 2, 3)) == pytest.approx(0.8 + 0.2 * (0.4 + 0.6 * 0.3))
    lengths = [model.expected(DraftShape(4, 5, nodes)) for nodes in range(3, 17)]
    gains = [b - a for a, b in itertools.pairwise(lengths)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(gains)) and gains[-1] >= 0
    # What is sure goes deep, what is not goes wide: better than any chain of as many nodes.
    assert model.expected(DraftShape(4, 5, 4)) > model.expected(DraftShape(1, 5, 4))
    useless = AcceptanceModel([0.0] * DEPTHS)
    assert useless.expected(DraftShape(4, 5, 8)) == 0


def test_expectations_follow_what_is_seen():
    """If this fails, the first answer about a shape stays the answer."""
    model, shape = AcceptanceModel(), DraftShape()
    before = model.expected(shape)
    for _ in range(50):
        model.learn(chain(0))
    assert model.expected(shape) < 0.2 * before
    for _ in range(400):
        model.learn(chain(3))
    assert model.expected(shape) > 2.5
    model.fade(0.0)
    model.learn(chain(3))
    assert before < model.expected(shape) < 2.5


def test_there_and_back():
    model = AcceptanceModel()
    for _ in range(9):
        model.learn(chain(2))
        model.learn(tree([0, 2], [0, 0, 0, 1, 1]))
    again = AcceptanceModel()
    again.restore(json.loads(json.dumps(model.to_dict())))
    assert again.to_dict() == model.to_dict() and again.steps == 18
    assert again.shares() == model.shares()
    assert again.expected(DraftShape(4, 5, 8)) == model.expected(DraftShape(4, 5, 8))


@pytest.mark.parametrize(
    "damage",
    [
        {"steps": "x"},
        {"first": [[1, 2]]},
        {"first": [["a", "b"]] * DEPTHS},
        {"first": [[2, 1]] * DEPTHS},
        {"first": [[-1, 1]] * DEPTHS},
        {"first": [[0, float("nan")]] * DEPTHS},
        {"first": [[0, float("inf")]] * DEPTHS},
        {"later": None},
        {"later": [1, 2, 3]},
    ],
    ids=str,
)
def test_damaged_fields_are_refused(damage):
    """If this fails, a file that a crash left decides what is drafted."""
    with pytest.raises((ValueError, TypeError, KeyError)):
        AcceptanceModel().restore(AcceptanceModel().to_dict() | damage)


def test_a_share_goes_from_assumed_to_seen():
    """If this fails, one wrong draft counts as much as all that is assumed, or seeing never wins."""
    share = RunningShare(weight=4.0, memory=50.0)
    assert share.share(0.7) == 0.7
    share.learn(1)
    assert share.share(0.5) == pytest.approx((1 + 4 * 0.5) / 5)
    for _ in range(1000):
        share.learn(0)
    assert share.tries == pytest.approx(50.0)  # what memory leaves of any number
    assert share.share(1.0) == pytest.approx(4 / 54, abs=1e-6)


def test_old_tries_count_less():
    """If this fails, a text that has changed is judged by how it began."""
    share = RunningShare(weight=1.0, memory=20.0)
    for hits in [1] * 200 + [0] * 20:
        share.learn(hits)
    assert share.share(0.5) == pytest.approx((20 * (1 - 1 / 20) ** 20 + 0.5) / 21, rel=1e-3)
    share.fade(0.0)
    assert share.share(0.25) == 0.25


def test_shares_of_several_tries():
    """If this fails, accepted over expected draft tokens is no share of the expected ones."""
    share = RunningShare(weight=0.0, memory=1e9)
    share.learn(3, 2.0)
    share.learn(1, 2.0)
    assert share.share(1.0) == pytest.approx(1.0)


def test_a_text_has_its_own_counts():
    """If this fails, an easy text is drafted for as a hard one, or a text tells the next one nothing."""
    all_texts, shape = AcceptanceModel(), DraftShape()
    easy, hard = AcceptanceModel(above=all_texts), AcceptanceModel(above=all_texts)
    for _ in range(30):
        easy.learn(chain(3))
        hard.learn(chain(0))
    new = AcceptanceModel(above=all_texts)
    assert all_texts.steps == 60 and easy.steps == hard.steps == 30
    assert new.shares()[0] == pytest.approx(all_texts.shares()[0]) and new.expected(shape) == pytest.approx(
        all_texts.expected(shape)
    )
    assert hard.expected(shape) < 0.3 < 1.0 < new.expected(shape) < 2.0 < 2.4 < easy.expected(shape)
    before = all_texts.to_dict()
    easy.fade(0.25)
    assert all_texts.to_dict() == before and easy.expected(shape) < 2.8


def test_a_text_heeds_what_others_teach_meanwhile():
    """If this fails, a text that decodes plainly never hears that the drafter has become good."""
    all_texts, shape = AcceptanceModel(), DraftShape()
    waiting, other = AcceptanceModel(above=all_texts), AcceptanceModel(above=all_texts)
    before = waiting.expected(shape), waiting.shares()[0][0]
    for _ in range(100):
        other.learn(chain(3))
    assert waiting.expected(shape) > before[0] + 0.5 and waiting.shares()[0][0] > before[1] + 0.2


def test_expected_tokens_of_lookups():
    """If this fails, what lookups bring is added up wrongly."""
    memory = LookupMemory()
    for kind, assumed in enumerate(LOOKUP_ASSUMED):
        right = memory.expected(kind)
        assert len(right) == DEEPEST + 1 and right[0] == 0
        assert right[2] == pytest.approx(assumed + assumed**2)
    for _ in range(2000):
        memory.learn(3, 4)
    assert memory.expected(3)[15] == pytest.approx(4, abs=0.3)
    assert memory.expected(2)[15] == pytest.approx(sum(LOOKUP_ASSUMED[2] ** n for n in range(1, 16)))


def test_what_a_grammar_forces_needs_no_lookup():
    """If this fails, a text with much that is fixed is looked up where the grammar brings the same."""
    controller = started(AGAIN[:20], Rates(2.0))
    before = controller.memory.expected(controller.kind)
    for _ in range(40):  # ten free tokens, of which a lookup brings only those behind the root, and ten forced ones
        text = controller.index.tokens
        controller.index.extend(AGAIN[len(text) : len(text) + 20])
        controller.learn(StepRead(Drafted(DraftShape()), AGAIN[:20], len(text), forced=range(10), certain=10))
    found = controller.memory.expected(len(LOOKUP_ASSUMED) - 1)
    assert before[DEEPEST] > 3 and found[10] < 1 and found[DEEPEST] == pytest.approx(found[10] + 5, abs=0.5)


def test_only_lookups_that_the_text_has_gone_past_are_judged():
    """If this fails, a lookup counts as wrong where the text has not got that far, or counts twice."""
    learnt = []
    controller = started(AGAIN[:20], Rates(2.0))
    controller.memory.learn = lambda kind, right, forced: learnt.append(right)
    decode(controller, AGAIN, 1, accepts=0, plan=PLAIN)
    assert learnt == []  # the first lookup is of what comes after this step
    before = len(controller.index.tokens)
    text = [*AGAIN[: before + 6], 999]
    for token in text[before : before + 6]:
        controller.index.extend([token])
    controller.learn(StepRead(PLAIN, text[before : before + 6], before + 6))
    assert learnt == []  # six of fifteen, all right so far
    controller.index.extend([999])
    controller.learn(StepRead(PLAIN, [999], before + 7))
    assert learnt == [6, 0]
