"""One form of documents and prompts, whatever form they come in."""

import json

import pytest
from support.documents import ASSISTANT, USER, lines

from mlx_redrafter import UserError
from mlx_redrafter.training.text.formats import Question, document, read_questions


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, ASSISTANT], "text": None},
        {"messages": [USER | {"content": [{"type": "text", "text": "Why?"}]}, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {"conversations": [{"from": f, "value": v} for f, v in (("gpt", "Lost."), ("human", "Why?"), ("gpt", "So."))]},
        {"conversations": [USER, ASSISTANT]},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"instruction": [USER], "output": [ASSISTANT]},
    ],
)
def test_forms_of_conversations(record):
    """If this fails, a common form of data is not read, or roles are mixed up."""
    assert document(record, "here").messages == [USER, ASSISTANT]


def test_questions(tmp_path):
    """If this fails, prompts are lost, or a file's own answers are taken for the target's."""
    system = {"role": "system", "content": "Be brief."}
    path = lines(
        tmp_path / "a.jsonl",
        {"turns": ["One?", "Two?"], "category": "x"},
        {"prompt": "Continue:"},
        {"messages": [system, USER, ASSISTANT, USER]},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    )
    one, two, three, four, five = read_questions(path, "--prompts")
    assert one == Question(f"{path} line 1", ["One?", "Two?"], category="x")
    assert two == Question(f"{path} line 2", ["Continue:"], plain=True)
    assert three == Question(f"{path} line 3", ["Why?", "Why?"], "Be brief.")
    assert four.turns == five.turns == ["Why?"]
    (tmp_path / "b.txt").write_text("One?\n\nTwo?\n")
    assert [q.turns for q in read_questions(str(tmp_path / "b.txt"), "--prompts")] == [["One?"], ["Two?"]]
    for content, message in (
        (b'{"turns": []}\n', "line 1: turns: expected a list of texts"),
        (b'{"turns": ["x", 1]}\n', r"line 1: turns\[1\]: found 1, expected text"),
        (b'{"text": "x"}\n', "line 1: found the fields text; expected turns, prompt, instruction, messages, or conv"),
        (json.dumps({"messages": [ASSISTANT]}).encode(), "messages: no message has the role user"),
        (b"", "empty, expected prompts"),
    ):
        (tmp_path / "c.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_questions(str(tmp_path / "c.jsonl"), "--prompts")
    with pytest.raises(UserError, match="--prompts nowhere: no such file"):
        read_questions("nowhere", "--prompts")
