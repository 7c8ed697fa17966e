"""Steps that are watched, and `demo --show-tree`: what was accepted is told apart, and the text stays plain's."""

import re
import sys

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support import Script

from mlx_redrafter import DraftShape
from mlx_redrafter.cli.main import main
from mlx_redrafter.decoding.planner import Planner
from mlx_redrafter.decoding.step import DecodingOptions
from mlx_redrafter.decoding.trace import watch
from mlx_redrafter.decoding.tree_view import word
from mlx_redrafter.drafting.lookup import LookupProposer, TextIndex
from mlx_redrafter.drafting.proposers import RecurrentProposer
from mlx_redrafter.drafting.shape import PLAIN, Drafted, LookedUp
from mlx_redrafter.embedded.assistant import QUESTIONS
from mlx_redrafter.embedded.corpus import held_out_prefixes
from mlx_redrafter.target.probe import verifier_of

STEP = re.compile(r"step \d+: (\d+) of (\d+) drafted accepted")


def shown(capsys, *flags) -> str:
    assert main(["demo", "--show-tree", "-m", "12", *flags]) == 0
    return capsys.readouterr().out


def plain_text(model, tokenizer, prompt=None, count=12) -> str:
    prompt = held_out_prefixes(1)[0] if prompt is None else prompt
    return "".join(r.text for r in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=count))


def text_of(out: str) -> str:
    return out.partition("The text:\n")[2].rpartition("\n\n12 tokens, ")[0]


def test_trees_are_shown(pair, capsys):
    """If this fails, the demo says something of a step that did not happen, or shows another text."""
    out = shown(capsys)
    assert "\033" not in out  # no terminal here
    assert text_of(out) == plain_text(pair[0], pair[2])
    blocks = [block for block in out.split("\n\n") if STEP.match(block)]
    assert len(blocks) > 1
    for block in blocks:
        accepted, drafted = map(int, STEP.match(block).groups())
        assert drafted == 7 == len(re.findall(r"[├└]─ ", block))
        assert block.count("% ✓ accepted\n") + block.endswith("✓ accepted") == accepted
        assert block.count("✗ rejected") == drafted - accepted
    assert sum(int(STEP.match(block)[1]) for block in blocks) > 0


@pytest.mark.parametrize("asked", ["", "1"])
def test_colours(asked, monkeypatch, capsys):
    """If this fails, NO_COLOR is ignored, or a terminal gets no colours."""
    monkeypatch.setenv("NO_COLOR", asked)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = shown(capsys)
    assert ("\033[" in out) == (asked == "")
    if not asked:
        assert re.search("\033\\[32m[^\n]* ✓ accepted\033\\[0m", out)
        assert not re.search("\033\\[32m[^\n]*✗", out) and "\033[31m" in out


def test_sentencepiece_keeps_its_spaces(stories, capsys):
    """If this fails, words run into each other where a tokenizer marks words by a space before them."""
    model, tokenizer = mlx_lm.load(str(stories))
    model.set_dtype(mx.float32)
    out = shown(capsys, "--model", str(stories), "--lookup", "on")
    assert text_of(out) == plain_text(model, tokenizer, QUESTIONS[0][1]) and " " in text_of(out).strip()
    for piece, expected in (("▁the", "' the'"), ("▁", "' '"), ("ing", "'ing'")):
        assert word(tokenizer, tokenizer.convert_tokens_to_ids(piece)) == expected


def watched(pair, shape, prompt, count, ends=()):
    model, drafter, _ = pair
    verifier = verifier_of(model)
    proposer, options = RecurrentProposer(drafter, verifier.target.embed), DecodingOptions(max_tokens=count)
    return list(watch(verifier, proposer, prompt, options, Planner(Drafted(shape)), drafter, ends))


def test_what_is_watched(pair, prefixes):
    """If this fails, probabilities or the accepted path belong to other candidates."""
    model, drafter, tokenizer = pair
    prompt = prefixes[0]
    expected = [r.token for r in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=16)]
    for shape in (DraftShape(1, 4, 3), DraftShape(4, 5, 12)):
        found = watched(pair, shape, prompt, 16)
        assert [token for _, tokens in found for token in tokens] == expected
        written = list(prompt) + found[0][1]
        for step, tokens in found[1:-1]:
            assert step.nodes[0].token == written[-1] and step.nodes[0].probability is None
            path = [node for node in step.nodes if node.accepted]
            assert [node.token for node in path[1:]] == tokens[:-1]
            assert [node.depth for node in path] == list(range(len(path)))
            by_parent: dict[int, float] = {}
            for node in step.nodes[1:]:
                by_parent[node.parent] = by_parent.get(node.parent, 0.0) + node.probability
            assert all(0 < share <= 1.001 for share in by_parent.values())
            written += tokens
    # A chain takes the most probable token each time: the drafter's own first word, asked by hand.
    step = watched(pair, DraftShape(1, 4, 3), prompt, 8)[1][0]
    verifier = verifier_of(model)
    hidden, _ = verifier.target.forward(mx.array([prompt]), make_prompt_cache(model))
    context, state = drafter.project_context(hidden[:, -1]), None
    for node, after in zip(step.nodes, step.nodes[1:]):
        state = drafter.advance(verifier.target.embed(mx.array([node.token])), state)
        shares = mx.softmax(drafter.logits(context, state)[0])
        draft = int(mx.argmax(shares))
        assert draft == after.token
        assert after.probability == pytest.approx(shares[draft].item(), abs=1e-4)


def test_the_end_of_the_text_ends_it(pair, prefixes):
    """If this fails, steps are shown that no text has."""
    whole = [token for _, tokens in watched(pair, DraftShape(4, 5, 7), prefixes[0], 24) for token in tokens]
    for i in (0, 7, 12):
        found = watched(pair, DraftShape(4, 5, 7), prefixes[0], 24, {whole[i]})
        assert [token for _, tokens in found for token in tokens] == whole[: whole.index(whole[i]) + 1]


def test_plain_steps_in_between_are_shown_as_such(pair, prefixes):
    """If this fails, a step shows the tree of another one as soon as a plain step lies between them."""
    model, drafter, tokenizer = pair
    verifier, prompt = verifier_of(model), prefixes[0]
    plans = [Drafted(DraftShape(4, 5, 7)), PLAIN, PLAIN, LookedUp(3), PLAIN, PLAIN, Drafted(DraftShape())]
    proposer = LookupProposer(RecurrentProposer(drafter, verifier.target.embed), TextIndex(prompt))
    options, planner = DecodingOptions(max_tokens=24), Script(plans)
    found = list(watch(verifier, proposer, prompt, options, planner, drafter))
    tokens = [token for _, tokens in found for token in tokens]
    assert tokens == [r.token for r in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=24)]
    assert found[0][0] is None and {read.plan for read in planner.steps} == set(plans)
    written = tokens[: len(found[0][1])]
    for (step, made), read in zip(found[1:], planner.steps, strict=True):
        assert step.nodes[0].token == written[-1] and step.tokens == made == read.tokens[: len(made)]
        in_vain = isinstance(read.plan, LookedUp) and len(step.nodes) == 1  # nothing was found
        assert in_vain or len(step.nodes) == 1 + read.plan.num_draft_tokens
        assert [node.token for node in step.nodes[1:] if node.accepted][: len(made)] == made[: len(read.tokens) - 1]
        assert step.by_lookup == (isinstance(read.plan, LookedUp) and not in_vain)
        assert all((node.probability is None) == step.by_lookup for node in step.nodes[1:])
        written += made


def test_the_demo_shows_lookup_alone_with_plain_steps(pair, capsys):
    """If this fails, the demo breaks where lookup finds nothing."""
    for lookup in ("on", "auto"):
        out = shown(capsys, "--draft", "none", "--lookup", lookup)
        assert text_of(out) == plain_text(pair[0], pair[2])
        blocks = [block for block in out.split("\n\n") if block.startswith("step ")]
        head = r"step \d+: \d of (0 drafted|[1-4] looked up) accepted"
        assert blocks and all(re.match(head, block) for block in blocks)
    assert re.search(r"step \d+: 0 of 0 drafted accepted, then the target's own", out)
