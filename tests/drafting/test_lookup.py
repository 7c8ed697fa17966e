"""What lookup finds, on the host and on the device, is what followed before, and it joins a tree."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support import RANDOM, REPEATING, Script, looked_up_by_hand, make_drafter, plainly
from support.steps import first_step

from mlx_redrafter.decoding.loop import speculative
from mlx_redrafter.decoding.planner import Planner
from mlx_redrafter.decoding.sampling import position_keyed
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.lookup import KEPT, LONGEST, NOTHING, LookupProposer, TextBuffer, TextIndex, join
from mlx_redrafter.drafting.proposers import Proposer, RecurrentProposer
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, LookedUp
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.target.tree import CandidateTree
from mlx_redrafter.target.verification import accept

CHAIN_PLAN, TREE_PLAN = Drafted(DraftShape(), True), Drafted(DraftShape(4, 5, 7), True)


def on_the_device(text, count):
    tokens, found = TextBuffer(mx.array([text])).continuation(count)
    return tokens[0].tolist() if found.item() else []


@pytest.mark.parametrize("lowest", [0, 1])
def test_host_and_device_find_what_followed(lowest):
    """If this fails, what is expected of lookups is not what they bring, or something else than what followed."""
    rng = np.random.default_rng(lowest)
    texts = [rng.integers(lowest, lowest + 3, rng.integers(1, 30)).tolist() for _ in range(200)]
    found = 0
    for text in [*texts, REPEATING, RANDOM, [1], [1, 1, 1], [lowest] * 9]:
        expected = looked_up_by_hand(text, 5)
        assert TextIndex(text).continuation(5) == expected == on_the_device(text, 5)
        found += bool(expected)
    assert 50 < found < len(texts)


@pytest.mark.parametrize("text", [[0, 5, 3, 0, 0], [0, 0], [7, 0, 0], [0], [0, 0, 1, 0, 0, 1, 0, 0]], ids=str)
def test_what_stands_before_the_text_matches_nothing(text):
    """If this fails, texts that end in token 0 are taken for repetitions of what was never written."""
    assert on_the_device(text, 4) == TextIndex(text).continuation(4) == looked_up_by_hand(text, 4)


def test_a_text_that_grows_is_the_whole_text():
    """If this fails, what was found depends on how many tokens a step brought."""
    rng = np.random.default_rng(4)
    text = rng.integers(0, 3, 120).tolist()
    grown, at = TextIndex(text[:1]), 1
    while at < len(text):
        step = int(rng.integers(1, 6))
        grown.extend(text[at : at + step])
        at += step
        assert grown.tokens == text[:at] and grown.continuation(6) == looked_up_by_hand(text[:at], 6)
    whole = TextIndex(text)
    assert (whole.tokens, whole.streak) == (grown.tokens, grown.streak)


def test_streaks():
    """If this fails, a text that repeats itself looks like one that does not."""
    assert TextIndex([]).streak == 0 and TextIndex([]).continuation(3) == []
    index, streaks = TextIndex([]), []
    for token in [*range(10), *range(10), 77, 78]:
        index.extend([token])
        streaks.append(index.streak)
    # Two tokens have to have been there before the third can be said.
    assert streaks == [0] * 12 + list(range(1, 9)) + [0, 0]


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
        assert buffer.continuation(6)[0][b].tolist() == looked_up_by_hand(text, 6)
    assert buffer.tokens.shape[1] < 600  # 150 times 4 tokens, had the bound not been tightened
    assert buffer.tokens[:, : LONGEST - 1].tolist() == [[NOTHING] * (LONGEST - 1)] * 2


def test_texts_join_and_leave_with_what_they_said():
    """If this fails, a text of a batch is looked up in another one, or its beginning is lost."""
    rng = np.random.default_rng(3)

    def begun(before, prompt):
        proposer = LookupProposer(Proposer(), None, before)
        proposer.begin(mx.array([prompt[:-1]], mx.int32), mx.array(prompt[-1:], mx.int32), mx.zeros((1, 1, 4)))
        return proposer, [*before, *prompt]

    first, text = begun([], [1, 2, 3])
    texts = [text]
    for before, prompt in (([], [4] * 300), ([5, 6, 7, 5], [6, 8]), ([1, 0, 1], [0])):
        other, text = begun(before, prompt if len(prompt) > 1 else prompt * 2)
        first.join(other)
        texts.append(text)
    for keep in ([0, 1, 2, 3], [2, 0, 3], [1, 0]):
        first.keep(keep)
        texts = [texts[place] for place in keep]
        for _ in range(20):
            drafted, choices = rng.integers(0, 3, (2, len(texts), 4))
            accepted = accept(CandidateTree.chain(mx.array(drafted, mx.int32)), mx.array(choices, mx.int32))
            first.advance(accepted, mx.zeros((len(texts), 4, 4)))
            for text, count, new in zip(texts, accepted.count.tolist(), choices, strict=True):
                text += new[: count + 1].tolist()
            first.tighten(max(map(len, texts)))
        root = mx.array([text[-1] for text in texts], mx.int32)
        tree = first.propose(mx.zeros((len(texts), 4)), root, LookedUp(5))
        found = first.text.continuation(5)[1].tolist()
        assert any(found)
        for n, text in enumerate(texts):
            if found[n]:
                assert tree.tokens[n, 1:].tolist() == looked_up_by_hand(text, 5)
    assert first.text.tokens.shape[1] < 700 and not first._in_flight


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


def proposer_for(verifier, drafter, prompt):
    inner = Proposer() if drafter is None else RecurrentProposer(drafter, verifier.target.embed)
    return LookupProposer(inner, TextIndex(prompt))


@pytest.mark.parametrize("plan", [TREE_PLAN, LookedUp(4)], ids=str)
def test_steps_in_a_batch(small_model, plan):
    """If this fails, one row of a batch looks things up in another's text."""
    prompts = [REPEATING, [*REPEATING[1:], 7]]
    verifier = verifier_of(small_model)
    step = first_step(verifier, prompts, proposer_for(verifier, make_drafter(), prompts[0]))
    texts = [[t] for t in step.root.tolist()]
    for i in range(2 * KEPT):
        # A copy that nothing makes anew is kept however long it is not needed.
        submitted = step(plan if i < 5 or i == 2 * KEPT - 1 else PLAIN)
        for b in range(2):
            texts[b] += submitted.tokens[b, : submitted.count[b].item() + 1].tolist()
    text = step.proposer.text
    for b, prompt in enumerate(prompts):
        assert texts[b] == plainly(small_model, prompt, len(texts[b]))
        held = text.tokens[b, LONGEST - 1 : text.end[b].item() + 1].tolist()
        assert held == prompt + texts[b]


def held(text):
    """The text on the device, of batch size 1."""
    return text.tokens[0, LONGEST - 1 : text.end.item() + 1].tolist()


@pytest.mark.parametrize("plan", [CHAIN_PLAN, TREE_PLAN, LookedUp(7)], ids=str)
def test_the_first_step_looks_up_with_the_root(small_model, plan):
    """If this fails, the first step looks for what followed the prompt's last token, and drafts the root again."""
    [root] = plainly(small_model, RANDOM, 1)
    # The root, which no repetition of the prompt says, has been there before, and what followed it.
    prompt = [*RANDOM[:9], RANDOM[-1], root, 50, 51, 52, *RANDOM[9:]]
    for _ in range(4):  # another prompt has another root; it settles soon
        [root] = plainly(small_model, prompt, 1)
        prompt[10] = root
    assert plainly(small_model, prompt, 1) == [root]
    verifier = verifier_of(small_model)
    step = first_step(verifier, [prompt], proposer_for(verifier, make_drafter(), prompt))
    tree = step.proposer.propose(step.context, step.root, plan)
    assert held(step.proposer.text) == [*prompt, root]
    assert (50, 51, 52) in paths_of(tree, 0)


def test_no_copy_of_the_text_while_nothing_is_looked_up(small_model):
    """If this fails, drafting costs operations of lookup's where it does not look up."""
    verifier = verifier_of(small_model)
    proposer, plan = proposer_for(verifier, make_drafter(), RANDOM), Drafted(DraftShape())
    options = DecodingOptions(position_keyed(3.0, 1), 30)
    for _ in speculative(verifier, proposer, mx.array([RANDOM]), verifier.make_cache(), options, Planner(plan)):
        assert proposer.text is None and proposer.arrays() == []


def test_the_copy_is_given_up_and_made_again(small_model):
    """If this fails, tokens of the step in flight are missing from the text, or rows from what attention reads."""
    verifier = verifier_of(small_model)
    planner = Script([LookedUp(8)] * 9 + [Drafted(DraftShape())] * (KEPT + 4) + [TREE_PLAN] * 3)
    proposer, cache = proposer_for(verifier, make_drafter(), REPEATING), verifier.make_cache()
    known, most, seen, options = list(REPEATING), 0, [], DecodingOptions(max_tokens=270)
    for produced in speculative(verifier, proposer, mx.array([REPEATING]), cache, options, planner):
        known += produced.tokens
        most = max(most, len(produced.tokens))
        seen.append(proposer.text is not None)
        assert cache.length.item() <= cache.bound
        assert proposer.index.tokens == known
        if proposer.text is not None:
            assert held(proposer.text)[: len(known)] == known
            assert proposer.text.end.item() < proposer.text._bound <= proposer.text.tokens.shape[1]
    assert known[len(REPEATING) :][:270] == plainly(small_model, REPEATING, 270)
    turns = sum(a != b for a, b in itertools.pairwise(seen))
    assert most > 3 and turns >= 4


def test_a_proposer_is_as_it_was_after_a_text(small_model):
    """If this fails, the last steps of one text are in the way of the next one."""
    verifier = verifier_of(small_model)
    proposer = proposer_for(verifier, make_drafter(), REPEATING)
    for prompt in (REPEATING, RANDOM * 2):
        proposer.index = TextIndex(prompt)
        options, tokens = DecodingOptions(max_tokens=60), []
        planner = Script([LookedUp(5), TREE_PLAN, PLAIN, PLAIN])
        for produced in speculative(verifier, proposer, mx.array([prompt]), verifier.make_cache(), options, planner):
            tokens += produced.tokens
        assert tokens[:60] == plainly(small_model, prompt, 60)
        assert proposer.index.tokens == prompt + tokens


def test_in_a_cache_that_holds_earlier_turns(small_model):
    """If this fails, lookup's text and the cache are apart by what was there before."""
    verifier, cache = verifier_of(small_model), make_prompt_cache(small_model)
    earlier, prompt = REPEATING, [3, 14, 15]
    verifier.target.forward(mx.array([earlier]), cache)
    proposer, options = proposer_for(verifier, None, earlier + prompt), DecodingOptions(max_tokens=20)
    adopted, tokens = verifier.make_cache(cache), []
    for produced in speculative(verifier, proposer, mx.array([prompt]), adopted, options, Planner(LookedUp(5))):
        tokens += produced.tokens
    assert tokens[:20] == plainly(small_model, earlier + prompt, 20)
    assert held(proposer.text)[: len(earlier)] == earlier
