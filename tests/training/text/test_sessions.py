"""`train --data sessions`: recorded answers are taken where they are the target's own, others are asked for again."""

import json
import stat

import pytest
from support import make_model
from support.templates import CHATML, renderer_of

from mlx_redrafter import UserError
from mlx_redrafter.target.model import Target
from mlx_redrafter.text.sessions import files
from mlx_redrafter.text.sessions.recorder import Recorder
from mlx_redrafter.training.text.sessions import whole
from mlx_redrafter.training.text.sources import DataPlan, prepare

END = "<|im_end|>"


@pytest.fixture
def chat(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    renderer = renderer_of(CHATML)
    return Target(make_model(vocab=4098)), renderer._tokenizer, renderer


def user(text):
    return {"role": "user", "content": text}


def test_recorded_answers_are_learned(chat, tmp_path):
    """If this fails, answers that the target gave are written a second time, or answers of others are learned."""
    target, tokenizer, _ = chat
    recorder = Recorder()

    def note(asked, said, model=target.model, ended=True, **settings):
        recorder.note(model, tokenizer, "m", asked, said, {"temp": 0.0} | settings, ended)

    for i in range(8):
        note([user(f"Question {i}?")], f"Answer {i}.")
    note([user("Question 0?"), {"role": "assistant", "content": "Answer 0."}, user("And?")], "More.")
    note([user("Cut?")], "An answer that", ended=False)
    note([user("Top?")], "An answer from the top", top_p=0.5)
    note([user("Others?")], "An answer of others", model=make_model(vocab=4098, seed=1))
    plan = DataPlan(("sessions",), length=64, held_out=1, temps=(0.0,))
    folder = tmp_path / "rows"
    rows = prepare(folder, target, tokenizer, plan)
    learned = [tokenizer.decode(tokens[counts].tolist()) for tokens, counts in zip(*rows[:], strict=True)]
    asked = [tokenizer.decode(tokens.tolist()) for tokens in rows[:][0]]
    assert sum(text in {f"Answer {i}.{END}" for i in range(1, 8)} for text in learned) == 7
    assert f"Answer 0.{END}More.{END}" in learned and len(rows) == 11
    assert all(not text.startswith("An answer") for text in learned)
    assert all(any(f"{word}?" in text for text in asked) for word in ("Cut", "Top", "Others"))
    copy = folder / "sessions.jsonl"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600 and stat.S_IMODE(copy.parent.stat().st_mode) == 0o700
    note([user("Later?")], "Later.")  # while the run is stopped
    assert len(prepare(folder, target, tokenizer, plan)) == 11
    files.delete()
    assert len(prepare(folder, target, tokenizer, plan)) == 11
    with pytest.raises(UserError, match=r"--data sessions: nothing is recorded in .*--record-sessions"):
        prepare(tmp_path / "new", target, tokenizer, plan)


def test_turns_of_a_conversation_come_once():
    """If this fails, the first turns of a conversation are learned once for every later one, or a client's words are
    learned as the target's."""
    said = [user("a"), {"role": "assistant", "content": "A"}, user("b"), {"role": "assistant", "content": "B"}]
    longer = [*said, user("c"), {"role": "assistant", "content": "C"}]
    records = [{"messages": said[:2], "own": True}, {"messages": said, "own": False}, {"messages": longer, "own": True}]
    [found] = whole(records, lambda record: record["own"])
    assert [message.get("weight") for message in found["messages"]] == [None, None, None, 0, None, None]
    [found] = whole(records[2:], lambda record: record["own"])
    assert [message.get("weight") for message in found["messages"][1::2]] == [0, 0, None]
    texts = [{"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": "z"}]
    assert whole(texts, lambda record: True) == texts[1:]
    assert json.dumps(records[2]["messages"]).count("weight") == 0


def test_sessions_stand_alone(chat, tmp_path):
    target, tokenizer, _ = chat
    with pytest.raises(UserError, match="--prompts is for --data self"):
        prepare(tmp_path, target, tokenizer, DataPlan(("sessions",), prompts="x"))
    with pytest.raises(UserError, match="'sessions' stands alone"):
        prepare(tmp_path, target, tokenizer, DataPlan(("sessions", "x.jsonl")))
