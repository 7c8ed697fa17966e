import mlx.core as mx
import pytest
from support import RANDOM, REPEATING, make_drafter, make_model, plainly

from mlx_redrafter.decoding.batch import Batch
from mlx_redrafter.decoding.batch_text import BatchText
from mlx_redrafter.decoding.planner import BatchPlanner
from mlx_redrafter.decoding.sampling import greedy, position_keyed
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.drafting.cached.draft_model import DraftModel
from mlx_redrafter.drafting.cached.eagle import EagleConfig, EagleHead
from mlx_redrafter.drafting.cached.mtp import MtpConfig, MtpHead
from mlx_redrafter.drafting.kinds import proposer_for
from mlx_redrafter.drafting.lookup import LookupProposer
from mlx_redrafter.drafting.medusa import MedusaConfig, MedusaHeads
from mlx_redrafter.drafting.proposers import Proposer
from mlx_redrafter.drafting.shape import PLAIN, Drafted, DraftShape, LookedUp
from mlx_redrafter.target.model import Target
from mlx_redrafter.target.probe import verifier_of
from mlx_redrafter.text.responses import Statistics

PROMPTS = [RANDOM, REPEATING, RANDOM[:3], REPEATING[:9]]
TREE = Drafted(DraftShape(3, 4, 6))


class Noted(BatchPlanner):
    """A plan, and what the planner was told."""

    def __init__(self, plan):
        super().__init__(plan)
        self.asked, self.learnt = [], []

    def plan(self, texts, length, follows=()):
        self.asked.append((texts, length))
        return self.always

    def learn(self, steps, timed=True):
        self.learnt.append(steps)


@pytest.fixture(scope="module")
def model():
    return make_model()


def eagle_head():
    layer = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "rms_norm_eps": 1e-5}
    head = EagleHead(EagleConfig(97, 32, layer, context_layers=(1, 2, 2), own_embedding=True))
    head.fit(Target(make_model()))
    return head


def own_layer():
    fields = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    fields |= {"num_attention_heads": 4, "rms_norm_eps": 1e-5, "vocab_size": 97}
    layer = MtpHead(MtpConfig(97, 32, fields))
    layer.fit(Target(make_model()))
    return layer


def batch_of(model, drafter, plan=TREE, **options):
    verifier = verifier_of(model)
    who = lambda _: proposer_for(drafter, verifier.target.embed)  # noqa: E731
    return Batch(verifier, who, plan if isinstance(plan, BatchPlanner) else BatchPlanner(plan), **options)


def finish(batch, texts):
    for text in texts:
        batch.add(text)
    parts = []
    while len(batch):
        parts.append(batch.step())
    return parts


@pytest.mark.parametrize(
    "drafter",
    [
        pytest.param(make_drafter(prefix_window=5), id="prefix"),
        pytest.param(make_drafter(prefix_window=5, prefix_layers=2), id="prefix of two layers"),
        pytest.param(MedusaHeads(MedusaConfig(97, 32, 3, 1)), id="medusa"),
        pytest.param(DraftModel(make_model(seed=1), None), id="model"),
        pytest.param(eagle_head(), id="eagle"),
        pytest.param(own_layer(), id="mtp"),
        pytest.param(None, id="plain"),
    ],
)
def test_every_kind_of_drafter(model, drafter):
    """If this fails, what a drafter keeps from step to step gets lost, or mixed up, where texts join and leave."""
    for plan in (PLAIN,) if drafter is None else (TREE, Drafted(DraftShape())):
        texts = [BatchText(prompt, DecodingOptions(max_tokens=4 + 5 * n)) for n, prompt in enumerate(PROMPTS)]
        finish(batch_of(model, drafter, plan, most_texts=3), texts)
        for text in texts:
            assert text.tokens == plainly(model, text.prompt, text.options.max_tokens)


def test_a_model_reads_each_text(model):
    """If this fails, a draft model reads another text's rows where texts join and leave: drafts get worse."""
    planner = Noted(Drafted(DraftShape()))
    texts = [BatchText(prompt, DecodingOptions(max_tokens=9 + 4 * n)) for n, prompt in enumerate(PROMPTS)]
    batch = batch_of(model, DraftModel(make_model(), None), planner, most_texts=3)
    finish(batch, texts)
    assert all(len(read.tokens) == 4 for reads in planner.learnt for read in reads)


def test_a_drafters_cache_is_as_long_as_its_texts(model):
    """If this fails, drafters with a cache read more and more rows that were rejected long ago, and keep them."""
    for drafter in (DraftModel(make_model(seed=1), None), eagle_head()):  # hardly ever right
        batch = batch_of(model, drafter, Drafted(DraftShape(1, 5, 4)))
        for n, prompt in enumerate(PROMPTS[:3]):
            batch.add(BatchText(prompt, DecodingOptions(max_tokens=60 + n)))
        while len(batch):
            texts = batch.running
            batch.step()
            if texts and batch.running:
                longest, cache = max(text.length for text in texts), batch._step.proposer.memory.cache
                assert cache.bound <= longest + 2 * 5


@pytest.mark.parametrize("layers", [1, 2])
def test_what_prefix_attention_drafts_is_what_it_drafts_alone(model, layers):
    """If this fails, prefix attention reads another text's rows: drafts get worse, texts do not."""
    drafter = make_drafter(prefix_window=5, prefix_layers=layers)

    def accepted(prompts):
        planner = Noted(TREE)
        texts = [BatchText(prompt, DecodingOptions(max_tokens=9 + 8 * (n == 0))) for n, prompt in enumerate(prompts)]
        finish(batch_of(model, drafter, planner), texts)
        return [(read[0].path, read[0].parents) for read in planner.learnt]

    assert accepted([PROMPTS[0], PROMPTS[2], PROMPTS[1]]) == accepted([PROMPTS[0]])


def test_each_has_its_own_processors_and_seed(model):
    """If this fails, a text's tokens go by another text's settings, or its processors see other tokens."""
    seen = []

    def ban(tokens, logits):
        seen.append(tokens.tolist())
        return mx.where(mx.arange(97) % 2 == tokens.shape[0] % 2, logits, -1e9)

    settings = [(greedy, ()), (position_keyed(0.9, 4), (ban,)), (position_keyed(0.9, 5), ())]
    texts = [
        BatchText(prompt, DecodingOptions(choose, 12, processors))
        for prompt, (choose, processors) in zip(PROMPTS, settings, strict=False)
    ]
    finish(batch_of(model, make_drafter()), texts)
    second = texts[1]
    assert all((token + len(second.prompt) + n) % 2 == 0 for n, token in enumerate(second.tokens))
    whole = second.prompt + second.tokens
    assert all(tokens[: len(second.prompt)] == second.prompt for tokens in seen)
    assert all(whole[:n] in seen for n in range(len(second.prompt), len(whole)))
    for text in (texts[0], texts[2]):
        assert text.tokens == plainly(model, text.prompt, 12, text.options.choose)


def test_a_failing_processor_ends_its_text_alone(model):
    """If this fails, one request's error ends those of others, or goes unnoticed."""

    def fails(tokens, logits):
        if tokens.shape[0] > len(PROMPTS[1]) + 3:
            raise ValueError("no such token")
        return logits

    def at_once(read, total):
        raise KeyError("progress")

    good, bad = BatchText(PROMPTS[0], DecodingOptions(max_tokens=12)), []
    bad.append(BatchText(PROMPTS[1], DecodingOptions(max_tokens=12, processors=(fails,))))
    bad.append(BatchText(PROMPTS[2], DecodingOptions(max_tokens=12, progress=at_once)))
    parts = finish(batch_of(model, make_drafter()), [bad[1], good, bad[0]])
    assert [type(text.error) for text in bad] == [ValueError, KeyError]
    assert all(text.finish_reason == "error" for text in bad)
    assert [part.text for step in parts for part in step if part.produced is None] == [bad[1], bad[0]]
    assert good.tokens == plainly(model, good.prompt, 12)


def test_long_prompts_are_read_between_steps(model):
    """If this fails, running texts stand still while a long prompt is read."""
    batch = batch_of(model, make_drafter(), chunk=8)
    first = BatchText(PROMPTS[2], DecodingOptions(max_tokens=60, prefill_step_size=8))
    second = BatchText(PROMPTS[0], DecodingOptions(max_tokens=2, prefill_step_size=8))
    batch.add(first)
    batch.step()
    batch.add(second)
    made = []
    while not second.tokens:
        before = len(first.tokens)
        batch.step()
        made.append(len(first.tokens) - before)
    assert len(made) >= 5 and all(made)
    batch.remove(first)
    assert first.finish_reason == "removed" and batch.running in ([], [second])


def test_prompts_of_like_length_are_read_together(model, monkeypatch):
    """If this fails, each prompt takes a pass over the weights of its own, or padding takes more than that."""
    calls, forward = [], Target.forward

    def counted(self, tokens, *args, **named):
        calls.append(tokens.shape)
        return forward(self, tokens, *args, **named)

    monkeypatch.setattr(Target, "forward", counted)
    monkeypatch.setattr(Target.of(model), "rows_at_once", 128)
    prompts = [[5] * 40, [6] * 300, [7] * 20, [8] * 9]
    texts = [BatchText(prompt, DecodingOptions(max_tokens=1 + n)) for n, prompt in enumerate(prompts)]
    batch = batch_of(model, make_drafter(), PLAIN)
    for text in texts:
        batch.add(text)
    batch.step()
    assert calls[0] == (3, 39) and calls[1:4] == [(1, 128), (1, 128), (1, 43)]  # and the steps read the last tokens
    assert set(calls[4:]) == {(4, 1)}
    assert all(text.tokens for text in texts)


def test_one_leaves_while_prompts_are_read(model):
    """If this fails, who hangs up while prompts are read together takes others with it, or stays."""
    texts = [BatchText([n] * 30, DecodingOptions(max_tokens=6, prefill_step_size=24)) for n in (1, 2, 3)]
    batch = batch_of(model, make_drafter(), chunk=24)
    for text in texts:
        batch.add(text)
    batch.step()
    assert not batch.running
    batch.remove(texts[0])
    while len(batch):
        batch.step()
    assert [len(text.tokens) for text in texts] == [0, 6, 6] and texts[0].finish_reason == "removed"
    assert texts[2].tokens == plainly(model, texts[2].prompt, 6)


def test_what_lookup_does_not_find_is_no_draft(model):
    """If this fails, a text's figures count rows as drafts that only fill the shape of the batch."""
    texts = [BatchText(prompt, DecodingOptions(max_tokens=24)) for prompt in (REPEATING, RANDOM)]
    counts = {id(text): Statistics() for text in texts}
    batch = Batch(
        verifier_of(model), lambda text: LookupProposer(Proposer(), None, text.before), BatchPlanner(LookedUp(3))
    )
    for n, parts in enumerate(finish(batch, texts)):
        for part in parts:
            statistics, produced = counts[id(part.text)], part.produced
            assert sum(produced.drafted) <= produced.drafts in (0, 3)
            assert n or produced.drafts == (3 if part.text is texts[0] else 0)  # no token of the second is there twice
            for one in produced.one_by_one():
                statistics.count(one)
    for text in texts:
        figures = counts[id(text)].figures()
        assert figures["draft_tokens"] == round(3 * figures["lookup_share"] * figures["steps"])
        assert figures["plain_share"] == 1 - figures["lookup_share"] and text.tokens == plainly(model, text.prompt, 24)
    assert counts[id(texts[1])].figures()["plain_share"] > 0


def test_an_end_inside_a_step(model):
    """If this fails, a text gets tokens after its end."""
    expected = plainly(model, PROMPTS[0], 20)
    ends = expected.index(expected[7])
    text = BatchText(PROMPTS[0], DecodingOptions(max_tokens=20), ends=lambda token: token == expected[7])
    parts = finish(batch_of(model, make_drafter()), [text])
    assert text.tokens == expected[: ends + 1] and text.finish_reason == "stop"
    assert [t for step in parts for part in step for t in part.produced.tokens] == text.tokens


def test_logits_are_kept_for_those_who_look_at_them(model):
    """If this fails, logits of all texts outlive every step, or somebody who asked gets none."""
    for wanted in ([False, False], [False, True]):
        batch = batch_of(model, make_drafter())
        for prompt, keep_logits in zip(PROMPTS, wanted, strict=False):
            batch.add(BatchText(prompt, DecodingOptions(max_tokens=6, keep_logits=keep_logits)))
        while len(batch):
            for part in batch.step():
                found = part.produced.logits
                if wanted[1] and not part.text.ended:
                    assert mx.argmax(found[: len(part.produced.tokens)], axis=-1).tolist() == part.produced.tokens
                assert any(wanted) or found.size == 0
