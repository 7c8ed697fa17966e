"""Prefix attention reads in pieces, as decoding commits them, what training reads at once."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_tokenizer
from support import make_drafter, make_model

from mlx_redrafter.decoding.loop import speculative
from mlx_redrafter.decoding.planner import Planner
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.decoding.trace import Watched
from mlx_redrafter.drafting.cached import memory as memories
from mlx_redrafter.drafting.cached import proposer
from mlx_redrafter.drafting.cached.memory import Memory
from mlx_redrafter.drafting.cached.proposer import PrefixProposer
from mlx_redrafter.drafting.prefix_attention import PrefixAttention, PrefixReader
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.text.generate import stream_generate
from mlx_redrafter.text.loading import EMBEDDED

WINDOW, SIZE, HIDDEN, EXIT = 6, 24, 16, 20


@pytest.fixture(params=[1, 2])
def prefix(request):
    mx.random.seed(3)
    return PrefixAttention(SIZE, HIDDEN, EXIT, WINDOW, request.param)


def normed(norm, x):
    return x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + 1e-6) * norm.weight


def by_hand(prefix, contexts, embeddings, row):
    """What comes out at one row, from the rows that it reaches alone, each weight by itself."""
    first = max(0, row + 1 - prefix.reach)
    rows = {
        place: contexts[place] @ prefix.input_context.weight.T + embeddings[place] @ prefix.input_token.weight.T
        for place in range(first, row + 1)
    }
    for block in prefix.layers:
        rows = {place: layer_by_hand(block, rows, place) for place in rows}
    return prefix.output(normed(prefix.norm, rows[row]))


def layer_by_hand(block, rows, row):
    """One layer at one row, from those of its window that there are."""
    near = [place for place in rows if row - WINDOW < place <= row]
    first, x = near[0], mx.stack([rows[place] for place in near])
    attention, y = block.self_attn, normed(block.input_layernorm, x)
    q, k = (
        mx.fast.rope(part(y)[None], HIDDEN, traditional=False, base=10000, scale=1, offset=first)[0]
        for part in (attention.q_proj, attention.k_proj)
    )
    shares = mx.softmax(q[-1:] @ k.T * HIDDEN**-0.5, axis=-1)
    x = x[-1:] + attention.o_proj(shares @ attention.v_proj(y))
    y = normed(block.post_attention_layernorm, x)
    gate = block.mlp.gate_proj(y)
    return (x + block.mlp.down_proj(gate * mx.sigmoid(gate) * block.mlp.up_proj(y)))[0]


def test_the_layers_are_what_they_say(prefix):
    """If this fails, a row reads what comes after it, or more than its window."""
    contexts, embeddings = mx.random.normal((2, 15, SIZE)), mx.random.normal((2, 15, HIDDEN))
    found = prefix(contexts, embeddings)
    for b, row in ((0, 0), (1, 3), (0, WINDOW - 1), (1, WINDOW), (0, 14)):
        assert np.allclose(found[b, row], by_hand(prefix, contexts[b], embeddings[b], row), atol=1e-5)


def test_how_far_it_reaches(prefix):
    """If this fails, more of a prompt's contexts are held than are read, or fewer."""
    contexts, embeddings = mx.random.normal((1, 20, SIZE)), mx.random.normal((1, 20, HIDDEN))
    whole = prefix(contexts, embeddings)[0, -1]
    for rows, same in ((prefix.reach, True), (prefix.reach - 1, False)):
        found = prefix(contexts[:, -rows:], embeddings[:, -rows:])[0, -1]
        assert np.allclose(found, whole, atol=1e-5) == same


def test_rows_in_pieces(prefix):
    """If this fails, what was rejected is attended to, or what was accepted is lost."""
    rng = np.random.default_rng(0)
    table = mx.random.normal((50, HIDDEN))
    contexts, tokens = mx.random.normal((2, 60, SIZE)), mx.array(rng.integers(0, 50, (2, 60)))
    at_once = prefix(contexts, table[tokens])
    memory, length = Memory(PrefixReader(prefix, lambda ids: table[ids])), [9, 9]
    memory.begin(tokens[:, :9], contexts[:, :9])
    for step in range(12):
        if step % 3 != 1:  # some rows wait for others
            _, found = memory.last()
            for b in range(2):
                assert np.allclose(found[b], at_once[b, length[b] - 1], atol=1e-5)
        if step == 4:
            grown, count = [1, 1], None  # a plain step
        elif step == 7:
            grown, count = [7, 7], None  # more than the window, all of it waiting
        else:
            grown = rng.integers(1, 5, 2).tolist()
            count = mx.array(grown, mx.int32)
        size = max(grown) + (0 if count is None else 1)
        rows, after = mx.random.normal((2, size, SIZE)), mx.zeros((2, size), mx.int32)
        for b in range(2):  # behind those that count lies what was rejected
            rows[b, : grown[b]] = contexts[b, length[b] : length[b] + grown[b]]
            after[b, : grown[b]] = tokens[b, length[b] : length[b] + grown[b]]
        memory.extend(after, rows, count)
        length = [a + b for a, b in zip(length, grown)]
    assert max(length) < 60


def test_little_waits(prefix, monkeypatch):
    """If this fails, a text that is decoded plainly for long holds the contexts of all its tokens."""
    monkeypatch.setattr(memories, "LONGEST", 100)  # of both texts
    contexts, tokens = mx.random.normal((2, 160, SIZE)), mx.arange(320).reshape(2, 160) % 50
    table = mx.random.normal((50, HIDDEN))
    memory, most = Memory(PrefixReader(prefix, lambda ids: table[ids])), 0
    memory.begin(tokens[:, :9], contexts[:, :9])
    for row in range(9, 160):
        memory.extend(tokens[:, row : row + 1], contexts[:, row : row + 1], None)
        most = max(most, sum(rows.tokens.size for rows in memory._waiting))
    assert most <= 100 + 2 * (9 + memories.PIECE)
    assert np.allclose(memory.last()[1], prefix(contexts, table[tokens])[:, -1], atol=1e-5)


def test_a_batch_holds_a_window(prefix):
    """If this fails, what prefix attention holds of texts in a batch grows with them."""
    rng, length = np.random.default_rng(1), [30, 20]
    contexts, table = mx.random.normal((2, 900, SIZE)), mx.random.normal((50, HIDDEN))
    tokens = mx.array(rng.integers(0, 50, (2, 900)))
    at_once, texts = prefix(contexts, table[tokens]), []
    for b, size in enumerate(length):
        texts.append(Memory(PrefixReader(prefix, lambda ids: table[ids])))
        texts[b].begin(tokens[b : b + 1, :size], contexts[b : b + 1, :size])
    memory, other = texts
    memory.join(other)
    for _ in range(200):
        grown = rng.integers(1, 4, 2).tolist()
        places = mx.array([[n, n + 1, n + 2] for n in length])
        rows = mx.take_along_axis(contexts, places[..., None], axis=1)
        memory.extend(mx.take_along_axis(tokens, places, axis=1), rows, mx.array(grown))
        length = [a + b for a, b in zip(length, grown)]
        _, found = memory.last()
        mx.eval(found, memory.arrays())
        memory.tighten(max(length) + 500)  # the prompts are longer than what is held of them
    assert all(layer.keys.shape[2] < 200 for layer in memory.cache.layers)
    for b in range(2):
        assert np.allclose(found[b], at_once[b, length[b] - 1], atol=1e-5)


class Alternating(Planner):
    """Chains, trees and plain steps in turn."""

    def __init__(self, first):
        self._plans = [Drafted(DraftShape(1, 4, 3)), PLAIN, Drafted(DraftShape(3, 4, 7)), PLAIN, PLAIN]
        self._next = first

    def plan(self):
        self._next += 1
        return self._plans[(self._next - 1) % len(self._plans)]


@pytest.mark.parametrize(("chunk", "window", "deep", "first"), [(2048, 8, 1, 1), (3, 8, 1, 1), (3, 5, 2, 0)])
def test_decoding_reads_what_training_reads(chunk, window, deep, first):
    """If this fails, a head is asked about another text than it was trained for: it drafts, but badly."""
    model = make_model()
    target, layers = Target.of(model), (1, 2)
    drafter = make_drafter(context_layers=layers, prefix_window=window, prefix_layers=deep)
    prompt = [3, 14, 15, 92, 65, 35, 89, 79, 3, 14, 15, 92]
    watched = Watched(PrefixProposer(drafter, target.embed))
    options, verifier = DecodingOptions(max_tokens=40, prefill_step_size=chunk), verifier_of(model)
    text, heads = list(prompt), []
    planner, prompts = Alternating(first), mx.array([prompt])
    for produced in speculative(verifier, watched, prompts, verifier.make_cache(), options, planner):
        if isinstance(produced.plan, Drafted):
            projected, _, _ = watched.steps.popleft()
            heads.append((len(text), projected))  # the root is the last token of the text
        text += produced.tokens
    contexts, _ = target.forward(mx.array([text]), [None] * 2, context_layers=layers)
    after = target.embed(mx.array([[*text[1:], 0]]))
    expected = drafter.project_context(contexts) + drafter.prefix(contexts, after)
    assert len(heads) > 10
    for length, projected in heads:
        assert np.allclose(projected[0], expected[0, length - 2], atol=1e-4)


@pytest.fixture(scope="module")
def tokenizer():
    """Ids are all that counts: any tokenizer will do, as long as no token ends the text."""
    found = load_tokenizer(EMBEDDED / "target")
    found.eos_token_ids = []
    return found


@pytest.mark.parametrize(("count", "window", "deep"), [(7, 24, 1), (8, 24, 1), (9, 24, 1), (10, 24, 1), (9, 8, 2)])
def test_a_conversation_reads_on(tokenizer, count, window, deep):
    """If this fails, a head sees nothing of earlier turns, or rows that were taken back."""
    model = make_model()
    target, layers = Target.of(model), (1, 2)
    drafter = make_drafter(context_layers=layers, prefix_window=window, prefix_layers=deep)
    cache, text, seen = make_prompt_cache(model), [], []

    class Spy(Memory):
        def last(self):
            found = super().last()
            seen.append(found[1])
            return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proposer, "Memory", Spy)
        for turn in ([3, 14, 15, 92], [65, 35, 89], [79, 3]):
            seen.clear()
            options = {"max_tokens": count, "shape": DraftShape(3, 4, 7), "prompt_cache": cache}
            responses = stream_generate(model, tokenizer, turn, drafter, cached_tokens=text, **options)
            known = [*text, *turn]
            text = known + [response.token for response in responses][:count]
            contexts, _ = target.forward(mx.array([text]), [None] * 2, context_layers=layers)
            expected = drafter.prefix(contexts, target.embed(mx.array([[*text[1:], 0]])))
            assert np.allclose(seen[0][0], expected[0, len(known) - 1], atol=1e-4)
