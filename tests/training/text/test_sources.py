"""What `--data` stands for, from flags to rows."""

import json

import numpy as np
import pytest
from support import make_model
from support.templates import CHATML, renderer_of
from support.texts import own_text

from mlx_redrafter import UserError
from mlx_redrafter.embedded.corpus import stdlib_files
from mlx_redrafter.target.model import Target
from mlx_redrafter.training.text import prefixes
from mlx_redrafter.training.text.sources import DataPlan, prepare


@pytest.fixture(scope="module")
def chat():
    """A random model with a chat template of its own special tokens: (target, tokenizer, renderer)."""
    renderer = renderer_of(CHATML)
    return Target(make_model(vocab=4098)), renderer._tokenizer, renderer


@pytest.fixture(scope="module")
def base():
    """A random model without a chat template."""
    renderer = renderer_of(None)
    return Target(make_model(vocab=4096)), renderer._tokenizer, renderer


def parts(rows):
    """Each row as what stands before the first token to learn, and the learned tokens."""
    for tokens, counts in zip(*rows[:], strict=True):
        first, end = np.argmax(counts), len(counts) - np.argmax(counts[::-1])
        yield tokens[:first].tolist(), tokens[first:end].tolist()
        assert counts[first:end].all()


def check_answers(target, rows, plan, ends):
    """Every greedy answer is what the target itself says after what stands before it."""
    for number, (before, answer) in enumerate(parts(rows)):
        if plan.temps[number % len(plan.temps)] == 0:
            assert answer == own_text(target.model, before, plan.length - len(before), ends)


def test_questions_of_its_own(chat, tmp_path):
    """If this fails, a chat model is not trained for on conversations."""
    target, tokenizer, renderer = chat
    plan = DataPlan(rows=18, length=96, held_out=2, temps=(0.0, 1.0), rows_per_shard=8)
    rows = prepare(tmp_path, target, tokenizer, plan)
    assert (len(rows), rows.held_out, len(rows.manifests[0]["shards"])) == (18, 2, 3)
    asked = set()
    for before, _ in parts(rows):
        text = tokenizer.decode(before)
        assert text.startswith("<|im_start|>user\n") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        asked.add(text)
    assert len(asked) > 12
    check_answers(target, rows, plan, renderer.ends)


def test_answers_to_prompts(chat, tmp_path):
    """If this fails, answers belong to other questions, or later turns do not see earlier answers."""
    target, tokenizer, renderer = chat
    target.model.lm_head.weight[renderer._tokenizer.convert_tokens_to_ids("<|im_end|>")] *= 3  # answers end
    file = tmp_path / "prompts.jsonl"
    talks = [{"turns": [f"Question {i}?", f"And {i}?"]} for i in range(5)] + [{"prompt": "x " * 200}]
    file.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    plan = DataPlan(("regenerated",), length=72, held_out=2, temps=(0.0,), prompts=str(file), rows_per_shard=4)
    rows = prepare(tmp_path / "rows", target, tokenizer, plan)
    check_answers(target, rows, plan, renderer.ends)
    found = [(tokenizer.decode(before), tokenizer.decode(answer)) for before, answer in parts(rows)]
    first = {before: answer for before, answer in found if "And" not in before}
    later = [before for before, _ in found if "And" in before]
    assert len(first) in (4, 5) and later
    for before in later:
        start = next(b for b in first if before.startswith(b))
        said = first[start].removesuffix("<|im_end|>")
        assert before == f"{start}{said}<|im_end|>\n" + start.replace("Question", "And")
    kept = {before[19:29] for before, _ in found[-rows.held_out :]}
    assert not kept & {before[19:29] for before, _ in found[: -rows.held_out]}
    plan = DataPlan(length=72, rows=30, held_out=2, temps=(0.0, 1.0), prompts=str(file))
    assert 24 < len(prepare(tmp_path / "many", target, tokenizer, plan)) <= 30


def test_base_models(base, tmp_path):
    target, tokenizer, renderer = base
    plan = DataPlan(rows=12, length=32, held_out=2, temps=(0.0,))
    rows = prepare(tmp_path / "bare", target, tokenizer, plan)
    first = renderer.first_token()
    for tokens, counts in zip(*rows[:], strict=True):
        assert tokens[0] == first and counts[1:].sum() > 20
        end = int(np.argmax(tokens[1:] == first)) + 1 if (tokens[1:] == first).any() else 32
        warm = prefixes.WARM_UP + 1
        if end > warm:
            expected = own_text(target.model, tokens[:warm].tolist(), 32 - warm, renderer.ends)
            assert tokens[warm : warm + len(expected)].tolist() == expected
            assert not counts[warm + len(expected) :].any() and counts[1 : warm + len(expected)].all()
    assert len({tuple(row) for row in rows[:][0]}) == 12
    (tmp_path / "p.txt").write_text("Once upon a time\nThere was\n")
    plan = DataPlan(("regenerated",), length=24, held_out=1, temps=(0.0,), prompts=str(tmp_path / "p.txt"))
    rows = prepare(tmp_path / "plain", target, tokenizer, plan)
    assert {tokenizer.decode(before) for before, _ in parts(rows)} == {"Once upon a time", "There was"}
    check_answers(target, rows, plan, renderer.ends)


def test_beginnings(base, tmp_path):
    """If this fails, held-out rows begin with text that training rows begin with too."""
    target, tokenizer, _ = base
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"{chr(65 + i)}{chr(65 + i)} is here\n" * 30)
    plan = DataPlan(rows=70, length=20, held_out=20, prefixes=(str(tmp_path),), prefix_length=4, rows_per_shard=25)
    rows = prepare(tmp_path / "rows", target, tokenizer, plan)
    begun = [tokenizer.decode(row[:4].tolist())[:2] for row in rows[:][0]]
    assert len(rows) == 70 and len(set(begun[-20:])) == 1 and len(set(begun[:-20])) > 12
    assert not set(begun[-20:]) & set(begun[:-20])
    (tmp_path / "0.txt").write_text("changed\n")
    with pytest.raises(UserError, match=r"/0.txt changed since its rows were begun"):
        prepare(tmp_path / "rows", target, tokenizer, plan)


def test_the_embedded_target_learns_nothing_held_out(pair, tmp_path, monkeypatch):
    """If this fails, figures on held-out files are figures on training text."""
    model, _, tokenizer = pair
    files = [(f[0], f[1], i % 20 > 3, f[3]) for i, f in enumerate(list(stdlib_files())[:60])]
    monkeypatch.setattr("mlx_redrafter.training.text.sources.stdlib_files", lambda: files)
    plan = DataPlan(rows=8, length=34, held_out=2, batch_size=8)
    rows = prepare(tmp_path, Target(model), tokenizer, plan, embedded=True)
    for tokens in rows[:][0]:
        beginning = tokenizer.decode(tokens[:32].tolist())
        assert any(beginning in text for _, text, held_out, _ in files if not held_out)


def test_files(chat, tmp_path):
    """If this fails, a document is both learned and held out, or lost."""
    target, tokenizer, _ = chat
    talks = [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"{i} it is."}]}
        for i in range(30)
    ]
    file, text = tmp_path / "a.jsonl", tmp_path / "b.txt"
    file.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    text.write_text("plain text here\n" * 9)
    plan = DataPlan((str(file), str(text)), length=40, held_out=5, rows_per_shard=10)
    rows = prepare(tmp_path / "rows", target, tokenizer, plan)
    assert rows.held_out == 5 and len(rows.manifests[0]["shards"]) > 3
    learned = [tokenizer.decode(row[counts].tolist()) for row, counts in zip(*rows[:], strict=True)]
    answers = [text for text in learned if "it is" in text]
    assert sorted(answers) == sorted(f"{i} it is.<|im_end|>" for i in range(30))
    assert sum("plain text" in text for text in learned) >= 1
    again = prepare(tmp_path / "again", target, tokenizer, plan)
    assert np.array_equal(rows[:][0], again[:][0])
    fewer = prepare(
        tmp_path / "fewer", target, tokenizer, DataPlan(plan.data, 40, rows=12, held_out=5, rows_per_shard=10)
    )
    assert np.array_equal(fewer[:7][0], rows[:7][0]) and np.array_equal(fewer[-5:][0], rows[-5:][0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"length": 9999}, "--row-length is 9999, expected at most the target's context of 512"),
        ({"length": 3}, "--row-length is 3, expected 4 or more"),
        ({"rows": 16}, "--rows is 16, expected 17 or more"),
        ({"temps": (-1.0,)}, "--temps -1.0: expected numbers of 0 or more"),
        ({"data": ("self", "x.txt")}, "--data self x.txt: 'self' stands alone"),
        ({"data": ("regenerated",)}, "--data regenerated: expected a file of prompts, --prompts FILE"),
        ({"data": ("x.txt",), "prompts": "p"}, "--prompts is for --data self or regenerated, found --data x.txt"),
        ({"prompts": "p", "prefixes": ("q",)}, "--prompts and --prefixes: expected one of them"),
        ({"prompts": "talks.jsonl"}, "talks.jsonl line 1: is a conversation, but the target has no chat template"),
        ({"data": ("talks.jsonl",)}, "talks.jsonl line 1: is a conversation, but the target has no chat template"),
        ({"prefixes": ("talks.jsonl",)}, "--prefixes: talks.jsonl line 1 is a conversation, expected text"),
        ({"prefixes": ("one.txt",)}, "--prefixes: found 1 text, expected 2 or more"),
        ({"prefixes": ("one.txt",), "held_out": 0}, "--prefixes: no text has as many as 32 tokens"),
        ({"prefixes": ("one.txt",), "length": 32}, "--prefix-length is 32, expected less than --row-length, 32"),
        ({"data": ("one.txt",)}, "--data one.txt: 1 documents are too few: 16 rows are held out"),
        (
            {"prompts": "one.txt", "length": 9},
            "--prompts one.txt: the shortest prompt has 2 tokens, expected at most 1",
        ),
        ({"prompts": "one.txt"}, "--prompts one.txt: found 1 prompts that fit into a row, expected more"),
    ],
)
def test_what_is_wrong(base, tmp_path, monkeypatch, flags, message):
    """If this fails, a wrong flag costs an hour of writing or ends in a traceback."""
    monkeypatch.chdir(tmp_path)
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}) + "\n" + json.dumps({"messages": talk}))
    (tmp_path / "one.txt").write_text("A text")
    with pytest.raises(UserError, match=message) as error:
        prepare(tmp_path / "rows", base[0], base[1], DataPlan(**flags))
    assert "\n" not in str(error.value) and not (tmp_path / "rows").exists()


def test_templates_that_leave_no_room(chat, tmp_path):
    with pytest.raises(UserError, match=r"--row-length is 12, expected 2\d or more: the chat template alone takes"):
        prepare(tmp_path, chat[0], chat[1], DataPlan(length=12))


def test_another_target_or_tokenizer_is_refused(chat, base, tmp_path):
    plan = DataPlan(rows=4, length=40, held_out=1)
    prepare(tmp_path, base[0], base[1], plan)
    other = Target(make_model(seed=1, vocab=4096))
    with pytest.raises(UserError, match="--model is"):
        prepare(tmp_path, other, base[1], plan)
    base[1].eos_token_ids = {0, 5}
    try:
        with pytest.raises(UserError, match="tokenizer"):
            prepare(tmp_path, base[0], base[1], plan)
    finally:
        base[1].eos_token_ids = {0}
