"""Lookup finds what followed before, joins a tree without changing the text, and knows when it pays."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support import make_drafter, make_model

from mlx_redrafter import Conversation, DraftShape, UserError, stream_generate
from mlx_redrafter.cli.main import main
from mlx_redrafter.decoding.loop import autoregressive, speculative
from mlx_redrafter.decoding.options import DecodingOptions
from mlx_redrafter.decoding.sampling import greedy, position_keyed
from mlx_redrafter.decoding.step import SpeculativeStep, prefill
from mlx_redrafter.drafting.lookup import LONGEST, SHORTEST, LookupProposer, TextBuffer, join
from mlx_redrafter.drafting.proposers import RecurrentProposer
from mlx_redrafter.drafting.shape import LookupChain
from mlx_redrafter.target.acceptance import accept
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import CHAIN
from mlx_redrafter.text.responses import drafted
from mlx_redrafter.tuning import lookup_controller
from mlx_redrafter.tuning.lookup_controller import LookupMemory, LookupWorth, TextIndex
from mlx_redrafter.tuning.session import tuning_for

REPEATING = [3, 14, 15, 92, 65, 35, 89, 79] * 4 + [3, 14, 15]
RANDOM = np.random.default_rng(1).permutation(97)[:40].tolist()


def by_hand(text, count):
    """The most recent of the longest matches, by looking at every place."""
    best = (0, 0)
    for end in range(len(text) - 1):
        run = 0
        while run < min(LONGEST, end + 1) and text[end - run] == text[-1 - run]:
            run += 1
        best = max(best, (run, end))
    run, end = best
    if run < SHORTEST:
        return None
    text = list(text)
    for i in range(count):
        text.append(text[end + 1 + i])
    return text[-count:]


def test_finds_what_followed():
    """If this fails, lookup proposes something else than what followed, or misses it."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 4, rng.integers(1, 30)).tolist() for _ in range(200)] + [REPEATING, RANDOM, [1], [1, 1, 1]]
    found = 0
    for text in texts:
        tokens, matched = TextBuffer(mx.array([text])).continuation(5)
        index = TextIndex(SHORTEST, LONGEST)
        index.extend(text)
        expected = by_hand(text, 5)
        assert index.continuation(5) == (expected or [])
        assert matched.item() == (expected is not None)
        if expected is not None:
            found += 1
            assert tokens[0].tolist() == expected
    assert 50 < found < len(texts)


def test_the_text_grows_with_what_is_accepted():
    """If this fails, lookup reads rejected tokens, or loses text where the buffer grows."""
    rng = np.random.default_rng(2)
    texts = [[5, 6], [7, 8]]
    buffer = TextBuffer(mx.array(texts))
    for _ in range(150):
        drafted = rng.integers(0, 3, (2, 4))
        choices = rng.integers(0, 3, (2, 4))
        accepted = accept(CandidateTree.chain(mx.array(drafted, mx.int32)), mx.array(choices, mx.int32))
        buffer.extend(accepted)
        counts = accepted.count.tolist()
        for b in range(2):
            texts[b] += choices[b, : counts[b] + 1].tolist()
        buffer.tighten(3 - max(counts))
    assert min(map(len, texts)) > 150
    for b, text in enumerate(texts):
        assert buffer.end[b].item() == LONGEST - 1 + len(text) - 1
        assert buffer.tokens[b, LONGEST - 1 : LONGEST - 1 + len(text)].tolist() == text
        assert buffer.continuation(6)[0][b].tolist() == by_hand(text, 6)
    assert buffer.tokens.shape[1] < 600  # 150 times 4 tokens, had the bound not been tightened


def paths_of(tree, row):
    """Token paths of the rows that count."""
    tokens, parents, valid = (x[row].tolist() for x in (tree.tokens, tree.parents, tree.valid))
    paths = []
    for i in range(1, tree.rows):
        path, at = [], i
        while at:
            path.insert(0, tokens[at])
            valid[i] = valid[i] and valid[at]
            at = parents[at]
        if valid[i]:
            assert tree.depths[row, i].item() == len(path) <= tree.max_depth
            paths.append(tuple(path))
    return paths


def random_tree(rng, rows, depth):
    """Distinct paths of at most `depth`, parents first."""
    paths = [()]
    while len(paths) < rows:
        path = (*paths[rng.integers(len(paths))], int(rng.integers(3)))
        if len(path) <= depth and path not in paths:
            paths.append(path)
    paths.sort(key=len)
    tokens = [9] + [path[-1] for path in paths[1:]]
    return tokens, [0] + [paths.index(path[:-1]) for path in paths[1:]]


def test_a_branch_joins_a_tree():
    """If this fails, a candidate is checked twice, a branch is lost, or a tree is cut down for nothing."""
    rng = np.random.default_rng(3)
    lines = [random_tree(rng, 8, 4) for _ in range(300)]
    branches = rng.integers(3, size=(300, 4))
    found = rng.random(300) < 0.8
    tree = CandidateTree.from_parents(mx.array([t for t, _ in lines]), mx.array([p for _, p in lines]), 4)
    for share in (1, 3, 7):
        joined = join(tree, mx.array(branches, mx.int32), mx.array(found), share)
        changed = 0
        for b, branch in enumerate(branches.tolist()):
            before, after = paths_of(tree, b), paths_of(joined, b)
            assert len(set(after)) == len(after)
            kept = {tuple(before[i]) for i in range(7 - share)}
            there = next((n for n in range(4, 0, -1) if tuple(branch[:n]) in kept), 0)
            if not found[b] or there == 4:
                assert after == before
                continue
            changed += 1
            reach = min(4, there + share)
            assert set(after) == kept | {tuple(branch[:n]) for n in range(1, reach + 1)}
        assert changed > 100


def proposer_for(verifier, drafter, shape, mode):
    inner = None if drafter is None else RecurrentProposer(drafter, verifier.target.embed, shape)
    return LookupProposer(inner, shape, mode)


def texts_of(model, drafter, prompt, shape, mode, choose, count=24, verifier=None):
    """The plain text, and the one with lookup and its mean acceptance length."""
    options = DecodingOptions(choose, count)
    plain = autoregressive(Target(model), mx.array([prompt]), make_prompt_cache(model), options)
    verifier = verifier or verifier_of(model)
    proposer = proposer_for(verifier, drafter, shape, mode)
    steps = [p.tokens for p in speculative(verifier, proposer, mx.array([prompt]), verifier.make_cache(), options)]
    tokens = [token for step in steps for token in step]
    return [p.tokens[0] for p in plain], tokens[:count], (len(tokens) - 1) / (len(steps) - 1)


@pytest.mark.parametrize("temp", [0.0, 0.8])
@pytest.mark.parametrize("mode", ["on", "auto"])
@pytest.mark.parametrize("drafting", [True, False])
def test_lookup_changes_nothing(mode, temp, drafting):
    """If this fails, lookup changes the text."""
    model, drafter = make_model(), make_drafter() if drafting else None
    choose = position_keyed(temp, seed=7)
    shapes = [DraftShape(4, 5, 7), DraftShape(4, 5, 1), DraftShape(2, 3, 4, "beams")] if drafting else []
    for shape in (DraftShape(), *shapes):
        for prompt in (REPEATING, RANDOM, [5]):
            plain, found, _ = texts_of(model, drafter, prompt, shape, mode, choose)
            assert found == plain


@pytest.mark.parametrize("shape", [DraftShape(), pytest.param(DraftShape(4, 5, 7), marks=pytest.mark.slow)], ids=str)
def test_lookup_pays_in_texts_that_repeat_themselves(pair, prefixes, shape):
    """If this fails, lookup finds nothing, or what it finds is not checked."""
    model, drafter, tokenizer = pair
    function = "def total(items):\n    result = 0\n    for item in items:\n        result += item.price * item.count\n"
    lengths = {"off": 0.0, "on": 0.0}
    for prompt in (tokenizer.encode((function + "    return result\n\n\n") * 2 + function[:30]), prefixes[1] * 2):
        plain, found, length = texts_of(model, drafter, prompt, shape, "on", greedy, 64)
        assert found == plain
        lengths["on"] += length
        *_, last = stream_generate(model, tokenizer, prompt, drafter, max_tokens=64, shape=shape)
        lengths["off"] += last.mean_acceptance_length
        if shape.beam_width == 1:
            plain, found, alone = texts_of(model, None, prompt, shape, "on", greedy, 64)
            assert found == plain and alone > 1.5
    assert lengths["on"] > lengths["off"] + 0.2


def test_on_a_target_that_takes_chains_only(small_model, chains_only):
    """If this fails, lookup puts branches where the target cannot verify them."""
    verifier = verifier_of(small_model)
    assert verifier.capability == CHAIN
    for mode in ("on", "auto"):
        plain, found, _ = texts_of(
            small_model, make_drafter(), REPEATING, DraftShape(4, 5, 7), mode, greedy, verifier=verifier
        )
        assert found == plain


def first_step(small_model, prompts, shape, drafter):
    verifier = verifier_of(small_model)
    cache = verifier.make_cache()
    hidden, logits = prefill(verifier.target, mx.array(prompts), cache.layers, DecodingOptions())
    cache.begin_trees(len(prompts))
    root = greedy(logits[:, None], None)[:, 0]
    proposer = proposer_for(verifier, drafter, shape, "on")
    proposer.begin(mx.array(prompts), root)
    return SpeculativeStep(verifier, proposer, DecodingOptions(), cache, hidden, root)


@pytest.mark.parametrize("drafting", [True, False])
@pytest.mark.parametrize("shape", [DraftShape(), DraftShape(4, 5, 7)], ids=str)
def test_a_step_is_one_lazy_graph(small_model, shape, drafting, in_one_piece):
    """If this fails, the host waits for the device to look something up."""
    step = first_step(small_model, [REPEATING], shape, make_drafter() if drafting else None)
    buffers = [(layer.keys, layer.values) for layer in step.cache.layers]

    class Built(Exception):
        pass

    def traced(context, root, length, tokens, end, buffers):
        step.context, step.root, step.cache.length = context, root, length
        step.proposer.text.tokens, step.proposer.text.end = tokens, end
        for layer, (keys, values) in zip(step.cache.layers, buffers):
            layer.keys, layer.values = keys, values
        step()
        raise Built

    with pytest.raises(Built):
        mx.compile(traced)(step.context, step.root, step.cache.length, *step.proposer.arrays(), buffers)  # type: ignore[call-arg]


@pytest.mark.parametrize("drafting", [True, False])
def test_steps_in_a_batch(small_model, drafting):
    """If this fails, one row of a batch looks things up in another's text."""
    prompts = [REPEATING, [*REPEATING[1:], 7]]
    step = first_step(small_model, prompts, DraftShape(4, 5, 7), make_drafter() if drafting else None)
    texts = [[t] for t in step.root.tolist()]
    for _ in range(10):
        submitted = step()
        for b in range(2):
            texts[b] += submitted.tokens[b, : submitted.count[b].item() + 1].tolist()
    text = step.proposer.text
    for b, prompt in enumerate(prompts):
        options = DecodingOptions(max_tokens=len(texts[b]))
        plain = autoregressive(Target(small_model), mx.array([prompt]), make_prompt_cache(small_model), options)
        assert texts[b] == [p.tokens[0] for p in plain]
        held = text.tokens[b, LONGEST - 1 : text.end[b].item() + 1].tolist()
        assert held == prompt + texts[b]


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


SHAPE, TREE = DraftShape(), DraftShape(4, 5, 7)


def decode(worth, clock, text, steps, accepts, seconds, shape=SHAPE, share=0):
    """Plays steps over a text to a LookupWorth.

    Args:
        accepts: of the drafter's tokens in each step.
        seconds: of a step without lookup (False) and with it (True).
        share: rows that a branch of lookup's would get in the drafter's tree.

    Returns:
        of each step what was drafted, and whether lookup's branch was in it.
    """
    found, position = [], 0
    for _ in range(steps):
        chosen = worth.choose(shape)
        alone = isinstance(chosen, LookupChain)
        joined = not alone and share > 0 and worth.joins()
        worth.built(chosen, joined, 0 if alone else share)
        found.append((chosen, joined))
        count = chosen.num_draft_tokens if alone else share if joined else 0
        lookup = worth.index.continuation(count)
        position = len(worth.index.tokens)
        right = next((i for i, token in enumerate(lookup) if text[position + i] != token), len(lookup))
        accepted = right if alone else max(accepts, right)
        clock.now += seconds[alone or joined]
        worth.learn(text[position : position + accepted + 1])
    return found


def looked_up(found):
    return [joined or isinstance(shape, LookupChain) for shape, joined in found]


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(lookup_controller, "time", clock)
    return clock


def started(prompt, **options):
    worth = LookupWorth(SHORTEST, LONGEST, **options)
    worth.begin(prompt[:-1])
    worth.learn(prompt[-1:])
    return worth


AGAIN = list(range(10)) * 400
FRESH = np.random.default_rng(0).integers(10_000, size=600).tolist()


def test_auto_weighs_gain_against_cost(clock):
    """If this fails, auto looks up where that costs speed, or does not where it brings some."""
    cheap = looked_up(decode(started(AGAIN[:20]), clock, AGAIN, 60, accepts=1, seconds={False: 1.0, True: 1.2}))
    assert not any(cheap[:5]) and sum(cheap[-40:]) == 35  # one in eight goes without
    dear = looked_up(decode(started(AGAIN[:20]), clock, AGAIN, 90, accepts=1, seconds={False: 1.0, True: 3.0}))
    assert any(dear) and not any(dear[-40:])  # tried, measured, and left
    assert not any(looked_up(decode(started(FRESH[:20]), clock, FRESH, 60, accepts=1, seconds={False: 1.0, True: 1.0})))
    as_good = decode(started(AGAIN[:20]), clock, AGAIN, 60, accepts=3, seconds={False: 1.0, True: 1.05})
    assert not any(looked_up(as_good))


def test_auto_follows_the_text(clock):
    """If this fails, lookup stays on after the text has stopped repeating itself, or never comes back."""
    text = AGAIN[:300] + FRESH[:400] + AGAIN[:2000]
    worth, found, at = started(text[:20]), [], []
    for _ in range(500):
        at.append(len(worth.index.tokens))
        found += looked_up(decode(worth, clock, text, 1, accepts=1, seconds={False: 1.0, True: 1.2}))
    used = [(place, one) for place, one in zip(at, found)]
    shares = [
        np.mean([one for place, one in used if low < place < high])
        for low, high in ((100, 290), (310, 700), (740, max(at)))
    ]
    assert min(shares[0], shares[2]) > 0.8 and shares[1] == 0 and max(at) > 1200


class Device:
    """Prices of a device on which every row beyond the first costs a tenth of a step."""

    def __init__(self, tokens, slow_lookup=1.0):
        self.tokens, self.slow_lookup = tokens, slow_lookup

    def seconds(self, shape, length):
        return 1 + 0.1 * shape.num_draft_tokens * (self.slow_lookup if isinstance(shape, LookupChain) else 1)

    def speed(self, length):
        return self.tokens / 1.3


def test_auto_looks_as_far_as_it_pays(clock):
    """If this fails, long repetitions are gone through a few tokens at a time, or guesses are long ones."""
    text = FRESH[:40] + AGAIN[:3000]
    worth = started(text[:20], prices=Device(2.0))
    found = [shape for shape, _ in decode(worth, clock, text, 140, accepts=1, seconds={False: 1.0, True: 1.0})]
    assert set(found[:10]) == {SHAPE}  # nothing was there before
    lengths = [shape.num_draft_tokens for shape in found if isinstance(shape, LookupChain)]
    assert lengths[0] < 15 and set(lengths[-20:]) == {15}
    # What a shape that is only being tried would bring is of no matter to the choice.
    tried, once = started(AGAIN[:20], prices=Device(30.0)), {False: 1.0, True: 1.0}
    assert not any(looked_up(decode(tried, clock, AGAIN, 20, accepts=0, seconds=once, shape=None)))
    better = started(text[:20], prices=Device(30.0))
    assert not any(looked_up(decode(better, clock, text, 140, accepts=1, seconds={False: 1.0, True: 1.0})))


def test_auto_joins_trees(clock):
    """If this fails, auto never puts a branch into a tree, or does where the tree has it already."""
    prices = Device(2.0, slow_lookup=100.0)
    worth = started(AGAIN[:20], prices=prices)
    found = decode(worth, clock, AGAIN, 80, accepts=1, seconds={False: 1.0, True: 1.0}, shape=TREE, share=3)
    joined = [joined for _, joined in found]
    assert not any(joined[:5]) and 25 <= sum(joined[-32:]) <= 29  # one in eight goes without
    worth = started(AGAIN[:20], prices=prices)
    found = decode(worth, clock, AGAIN, 80, accepts=4, seconds={False: 1.0, True: 1.0}, shape=TREE, share=3)
    assert not any(joined for _, joined in found)  # the drafter says the same
    worth = started(FRESH[:20], prices=prices)
    found = decode(worth, clock, FRESH, 80, accepts=1, seconds={False: 1.0, True: 1.0}, shape=TREE, share=3)
    assert not any(joined for _, joined in found)


def test_what_lookups_brought_outlives_texts(clock):
    """If this fails, every text finds out again what lookup is worth."""
    memory, seconds = LookupMemory(), {False: 1.0, True: 1.0}
    dear = Device(3.5)  # what is assumed of lookups does not pay, what is seen of them does
    fresh = looked_up(decode(started(AGAIN[:20], prices=dear, memory=memory), clock, AGAIN, 60, 1, seconds))
    after = looked_up(decode(started(AGAIN[:20], prices=dear, memory=memory), clock, AGAIN, 60, 1, seconds))
    assert not fresh[0] and all(fresh[-20:]) and all(after)


def test_a_branch_needs_steps_to_compare_with(clock):
    """If this fails, every text begins with branches in its trees, whether they bring anything or not."""
    memory = LookupMemory()
    for gain in memory.gain:
        for value in [0.0] * 10 + [0.01]:
            gain.add(value)
    worth = started(AGAIN[:20], prices=Device(2.0, slow_lookup=100.0), memory=memory)
    assert not worth.joins()


def test_auto_asks_nothing_of_the_device_while_it_is_off(small_model):
    """If this fails, auto costs operations where lookup does not pay."""
    verifier = verifier_of(small_model)
    proposer = proposer_for(verifier, make_drafter(), DraftShape(), "auto")
    for _ in speculative(
        verifier, proposer, mx.array([RANDOM]), verifier.make_cache(), DecodingOptions(position_keyed(3.0, 1), 30)
    ):
        assert proposer.text is None and proposer.arrays() == []


def test_the_text_is_whole_when_auto_turns_on(small_model, monkeypatch):
    """If this fails, tokens of the step in flight are missing from the text, or rows from what attention reads."""
    calls = []

    def choose(self, shape):
        calls.append(shape)
        return LookupChain.of(8) if len(calls) > 4 else None

    monkeypatch.setattr(LookupWorth, "choose", choose)
    verifier = verifier_of(small_model)
    proposer, cache = proposer_for(verifier, None, DraftShape(1, 9, 8), "auto"), verifier.make_cache()
    known, most = list(REPEATING), 0
    for produced in speculative(verifier, proposer, mx.array([REPEATING]), cache, DecodingOptions(max_tokens=150)):
        known += produced.tokens
        most = max(most, len(produced.tokens))
        assert cache.length.item() <= cache.bound
        if proposer.text is not None:
            text = proposer.text.tokens[0, LONGEST - 1 : proposer.text.end.item() + 1].tolist()
            assert text[: len(known)] == known
    assert most > 4 and proposer.text is not None


def test_a_proposer_is_as_it_was_after_a_text(small_model):
    """If this fails, the last step of one text decides how the next one is drafted."""
    verifier, shapes = verifier_of(small_model), []
    for drafter, shape in ((None, DraftShape(1, 9, 8)), (make_drafter(), DraftShape(4, 5, 7))):
        proposer = proposer_for(verifier, drafter, shape, "auto")
        asked = proposer.shape
        for _ in range(2):
            options, steps = DecodingOptions(max_tokens=80), 0
            for produced in speculative(verifier, proposer, mx.array([REPEATING]), verifier.make_cache(), options):
                shapes.append(produced.shape)
                steps += isinstance(produced.shape, LookupChain)
            assert proposer.shape == asked and steps > 3
    assert DraftShape(4, 5, 7) in shapes


def test_plain_steps_beside_lookup_are_plain(small_model):
    """If this fails, steps without a lookup cost more than plain decoding's."""
    verifier = verifier_of(small_model)
    proposer, cache, settled = proposer_for(verifier, None, DraftShape(), "auto"), verifier.make_cache(), []
    options = DecodingOptions(position_keyed(3.0, 1), 30)
    for produced in speculative(verifier, proposer, mx.array([RANDOM]), cache, options):
        if not produced.from_prompt and produced.shape is None:
            settled.append(cache.plain_rows(None))
    assert len(settled) > 10 and all(settled)


def test_lookup_is_on_where_the_shape_is_chosen(pair):
    """If this fails, a user has to know of lookup to have it; or it comes where a shape was asked for."""
    model, drafter, tokenizer = pair
    prompt = "import os\nimport sys\n" * 12
    known = tuning_for(verifier_of(model), drafter).memory.lookup
    before = known.reach[-1].expected()
    *_, last = stream_generate(model, tokenizer, prompt, drafter, max_tokens=64)
    assert last.lookup_share > 0 and "by lookup" in drafted(last)  # how much depends on what steps cost here
    assert known.reach[-1].expected() != before  # what it brought is remembered of this pair
    *_, last = stream_generate(model, tokenizer, prompt, drafter, max_tokens=64, shape=DraftShape())
    assert last.lookup_share == 0 and drafted(last) == "by the drafter (mostly chain of 3)"
    *_, last = stream_generate(model, tokenizer, prompt, None, max_tokens=64, lookup="on")
    assert (last.lookup_share, last.shape, drafted(last)) == (1, None, "by lookup")
    *_, last = stream_generate(model, tokenizer, prompt, None, max_tokens=64)
    assert last.method == "plain"


def test_earlier_turns_are_looked_at(pair):
    """If this fails, a conversation looks only at its last message."""
    model, _, tokenizer = pair
    function = "def total(items):\n    result = 0\n    for item in items:\n        result += item.price * item.count\n"
    seen = []
    begin = LookupProposer.begin

    def spy(self, text, root):
        begin(self, text, root)
        seen.append(self.text.tokens[0, LONGEST - 1 :].tolist())

    conversation = Conversation(model, tokenizer, None, max_tokens=8, lookup="on")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LookupProposer, "begin", spy)
        for _ in range(2):
            *_, last = conversation.ask(function)
    assert last.method == "lookup" and last.prompt_tokens < len(seen[1]) - 20
    assert seen[1][: len(seen[0])] == seen[0]


def test_from_the_shell(capsys):
    """If this fails, --lookup does nothing, or is not refused where it is wrong."""
    prompt = "import os\nimport os\nimport os\nimport"
    texts = {}
    for flags in ("--draft none", "--draft none --lookup on", "--lookup auto", "--lookup on --beam-width 4"):
        assert main(["generate", "-p", prompt, "-m", "24", "--json", *flags.split()]) == 0
        found = json.loads(capsys.readouterr().out)
        texts[flags] = found["tokens"]
        assert found["method"] == {"--draft none": "plain", "--draft none --lookup on": "lookup"}.get(
            flags, "redrafter"
        )
    assert len({tuple(tokens) for tokens in texts.values()}) == 1
    with pytest.raises(SystemExit):
        main(["generate", "-p", "x", "--lookup", "maybe"])


def test_a_wrong_word_for_lookup(pair):
    model, drafter, tokenizer = pair
    with pytest.raises(UserError, match="--lookup is 'maybe', expected one of auto, on, off"):
        next(stream_generate(model, tokenizer, "x", drafter, lookup="maybe"))
